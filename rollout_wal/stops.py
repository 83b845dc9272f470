"""Stop strings: found in the text, which only the front end has. The Finish record cuts what the engine ran past.

A rollout ends with the first token after which its text holds one of the strings. That token is found by decoding, so
it is the same whether it is looked for while tokens arrive or in a log that is read back.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from .errors import BadSampling, MissingExtra, problem

#: Raw tokens that are looked through for each one that the tokenizer must know.
_RAW: Final = 4


class StopWatch:
    """Watches rollouts for their stop strings. The tokenizer is loaded when the first one needs it."""

    def __init__(self, model: str) -> None:
        self._file = Path(model) / "tokenizer.json"
        self._tokenizer: Any = None
        self._watched: dict[int, tuple[tuple[str, ...], int, int]] = {}

    def __len__(self) -> int:
        return len(self._watched)

    def __contains__(self, rollout: int) -> bool:
        return rollout in self._watched

    @property
    def tokenizer(self) -> Any:
        """Raises MissingExtra, BadSampling: there is nothing to detokenise with."""
        if self._tokenizer is None:
            try:
                from tokenizers import Tokenizer
            except ImportError:
                raise MissingExtra("tokenizers", "hf", "finding stop strings") from None
            if not self._file.is_file():
                raise BadSampling(
                    problem(
                        f"stop strings need a tokenizer, and {self._file} is not there",
                        consequence="They could not be found in the output, so nothing was begun",
                        remedy="Put the tokenizer into the model's folder, or use stop_token_ids",
                    )
                )
            self._tokenizer = Tokenizer.from_file(str(self._file))
        return self._tokenizer

    def watch(self, rollout: int, stop: tuple[str, ...], *, min_tokens: int, seen: int = 0) -> None:
        """From now on `check` looks at a rollout. Its first `seen` output tokens have been looked at."""
        self._watched[rollout] = (stop, min_tokens, seen)

    def forget(self, rollout: int) -> None:
        self._watched.pop(rollout, None)

    def check(self, rollout: int, length: int, last: Callable[[int], NDArray[Any]]) -> int | None:
        """How many output tokens count, or None while no stop string has appeared.

        Args:
            length: output tokens so far.
            last: the last n output tokens. No more than needed are asked for: putting all of a long rollout
                together at each of its steps would be quadratic.
        """
        stop, min_tokens, seen = self._watched[rollout]
        self._watched[rollout] = (stop, min_tokens, length)
        token_T = last(length - seen + _RAW * _reach(stop))
        offset = length - len(token_T)
        cut = self.first_stop(self.tokenizer, stop, token_T, min_tokens - offset, seen=seen - offset)
        return None if cut is None else cut + offset

    @staticmethod
    def first_stop(
        tokenizer: Any, stop: tuple[str, ...], token_T: NDArray[Any], min_tokens: int, *, seen: int = 0
    ) -> int | None:
        """The least count of tokens, above `seen` and at least `min_tokens`, whose last token completes a stop string.

        Only a window of tokens is decoded: a stop string of n bytes that ends in the newest token began at most n
        bytes before, and a token is at least one byte. Tokens that are none (the tokenizer does not know them) are
        left out first; they could otherwise push the beginning out of the window.
        """
        reach = _reach(stop)
        for count in range(max(seen + 1, min_tokens, 1), len(token_T) + 1):
            window = _known(tokenizer, token_T, count, reach)
            if not window or window[-1] != token_T[count - 1]:
                continue  # the newest token says nothing, so it completes nothing
            text = tokenizer.decode(window, skip_special_tokens=False)
            if not any(s in text for s in stop):
                continue
            # What the token before had completed already (below min_tokens) does not count again.
            before = tokenizer.decode(window[:-1], skip_special_tokens=False)
            same = next((i for i, (a, b) in enumerate(zip(text, before)) if a != b), min(len(text), len(before)))
            if any(text.find(s, max(0, same - len(s) + 1)) >= 0 for s in stop):
                return count
        return None


def _reach(stop: tuple[str, ...]) -> int:
    """How many tokens back a stop string may begin; and some more, for a character that spans tokens."""
    return max(len(s.encode()) for s in stop) + 8


def _known(tokenizer: Any, token_T: NDArray[Any], count: int, reach: int) -> list[int]:
    """The last `reach` tokens of the first `count` that the tokenizer knows. How far back it looks for them is bounded,
    so that the same tokens are found whether all of the output is at hand or its end."""
    window: list[int] = []
    for token in token_T[max(0, count - _RAW * reach) : count][::-1].tolist():
        if tokenizer.id_to_token(token) is not None:
            window.append(token)
            if len(window) == reach:
                break
    return window[::-1]
