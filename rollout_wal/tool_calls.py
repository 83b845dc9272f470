"""A tool-call parser for the common kind of model: JSON between two tags, results between two others.

    <tool_call>{"name": "exec", "arguments": {"command": "ls"}}</tool_call>

What a tool returns is text of the outside world. It is encoded so that no part of it becomes a special token: output
that holds an end-of-turn mark says so in letters, and ends no turn.
"""

from __future__ import annotations

import hashlib
import json
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .episode import BadToolCall, ToolCall, ToolResult
from .errors import MissingExtra


class TaggedToolCalls:
    """Implements `episode.ToolCallParser`. Any number of calls in one turn.

    Args:
        model: folder with the model's `tokenizer.json`.
        tags: around a call. The second one ends the turn if `stop_at_call`; otherwise the model's end of sequence does.
        before, after: of all results of a turn; here the chat template's own marks are wanted, so they may be special
            tokens. With `stop_at_call`, `before` has to end the assistant's message, too.
        result: around each result; `{}` stands for its text.

    Raises:
        MissingExtra: tokenizers is not installed.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        tags: tuple[str, str] = ("<tool_call>", "</tool_call>"),
        before: str = "\n",
        result: tuple[str, str] = ("<tool_response>\n", "\n</tool_response>\n"),
        after: str = "",
        stop_at_call: bool = True,
    ) -> None:
        try:
            from tokenizers import Tokenizer
        except ImportError:
            raise MissingExtra("tokenizers", "hf", "reading tool calls") from None
        file = Path(model) / "tokenizer.json"
        self._tokenizer: Any = Tokenizer.from_file(str(file))
        self._plain: Any = Tokenizer.from_file(str(file))
        self._plain.encode_special_tokens = True
        self._tags, self._before, self._result, self._after = tags, before, result, after
        self.stop_token_ids: tuple[int, ...] = ()
        self.stop: tuple[str, ...] = (tags[1],) if stop_at_call else ()
        digest = hashlib.blake2b(file.read_bytes(), digest_size=8)
        digest.update(repr((tags, before, result, after, stop_at_call)).encode())
        self.name = f"tagged/{digest.hexdigest()}"

    def calls(self, token_T: NDArray[np.int32]) -> Sequence[ToolCall]:
        """See `ToolCallParser.calls`."""
        text: str = self._tokenizer.decode(token_T.tolist(), skip_special_tokens=False)
        opening, closing = self._tags
        before, *pieces = text.split(opening)
        if not pieces and closing in text:
            raise BadToolCall(f"[{closing} without {opening}]")
        calls: list[ToolCall] = []
        start = len(before)
        for piece in pieces:
            call, length = self._call(piece)
            end = start + len(opening) + length
            span = self._tokens_to(token_T, text[: start + 1]) - 1, self._tokens_to(token_T, text[:end])
            calls.append(replace(call, span=span))
            start += len(opening) + len(piece)
        return calls

    def _tokens_to(self, token_T: NDArray[np.int32], text: str) -> int:
        """The least count of tokens that say all of this beginning of what they say."""

        def says(count: int) -> bool:
            return str(self._tokenizer.decode(token_T[:count].tolist(), skip_special_tokens=False)).startswith(text)

        return bisect_left(range(1, len(token_T)), True, key=says) + 1

    def _call(self, piece: str) -> tuple[ToolCall, int]:
        """A call, and where it ends in what follows its opening tag."""
        body, closing, _ = piece.partition(self._tags[1])
        if not closing:
            raise BadToolCall(f"[{self._tags[0]} without {self._tags[1]}]")
        try:
            raw = json.loads(body)
            name, arguments = raw["name"], raw.get("arguments", {})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise BadToolCall(f"[the call is no JSON object with a name: {type(error).__name__}]") from error
        if not isinstance(name, str) or not isinstance(arguments, dict):
            raise BadToolCall('[a call is {"name": text, "arguments": object}]')
        return ToolCall(name, arguments), len(body) + len(closing)

    def observe(self, results: Sequence[ToolResult]) -> NDArray[np.int32]:
        """See `ToolCallParser.observe`."""
        ids: list[int] = self._ids(self._before)
        for each in results:
            ids += self._ids(self._result[0])
            ids += self._plain.encode(each.text, add_special_tokens=False).ids
            ids += self._ids(self._result[1])
        ids += self._ids(self._after)
        return np.asarray(ids, np.int32)

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer.encode(text, add_special_tokens=False).ids
        return ids
