"""What a caller asks of the sampler. Light on purpose: the log stores these, and the log needs no torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Final

from .errors import BadSampling, problem

#: The one noise scheme of this version; see `rollout_wal.sampling`. Logged at Begin, never inferred.
NOISE_SCHEME = "philox4x32-10/gumbel/1"

#: What the fields hold, by their annotations.
_SCALARS: Final[dict[str, type]] = {"float": float, "int": int, "bool": bool, "str": str}
_TUPLES: Final[dict[str, type]] = {"tuple[int, ...]": int, "tuple[str, ...]": str}


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How the tokens of one rollout are drawn. Numbers may be numpy's: they are kept as Python's, so that parameters
    that are equal are logged alike.

    Args:
        temperature: 0 is greedy. Logits are divided by it before any filter.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches p; 1.0 keeps all.
        min_p: drop tokens less likely than min_p times the most likely one; 0.0 drops none.
        max_tokens: at most this many sampled tokens, over all resumes together.
        min_tokens: no end of sequence and no stop token before this many sampled tokens.
        stop_token_ids: tokens that end the rollout besides the model's own end of sequence.
        stop: strings that end the rollout; found in the detokenised text, cut by the Finish record.
        ignore_eos: go on past the model's end of sequence.
        repetition_penalty, presence_penalty, frequency_penalty: as commonly defined (CTRL; OpenAI), over the
            prompt and output (repetition) or the output only (presence, frequency).

    Raises:
        BadSampling: a value out of range or of another type; the message names the field, the value and the range.
    """

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    max_tokens: int = 256
    min_tokens: int = 0
    stop_token_ids: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    ignore_eos: bool = False
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    noise_scheme: str = field(default=NOISE_SCHEME)

    def __post_init__(self) -> None:
        def check(name: str, ok: bool, rule: str) -> None:
            if not ok:
                raise BadSampling(
                    problem(
                        f"sampling parameter {name}={getattr(self, name)!r} is out of range: {rule}",
                        consequence="The rollout was not begun and nothing was logged",
                        remedy=f"Pass a {name} within the range",
                    )
                )

        for f in fields(self):
            try:
                object.__setattr__(self, f.name, _plain(str(f.type), getattr(self, f.name)))
            except (TypeError, ValueError, OverflowError):
                check(f.name, False, f"a value of type {f.type}")
        # `not (x >= 0)` rather than `x < 0`: NaN must fail too.
        check("temperature", 0.0 <= self.temperature < float("inf"), "a finite number >= 0")
        check("top_k", self.top_k >= 0, "an integer >= 0 (0 keeps all)")
        check("top_p", 0.0 < self.top_p <= 1.0, "in (0, 1]")
        check("min_p", 0.0 <= self.min_p <= 1.0, "in [0, 1]")
        check("max_tokens", self.max_tokens >= 1, "an integer >= 1")
        check("min_tokens", 0 <= self.min_tokens <= self.max_tokens, "between 0 and max_tokens")
        check("stop_token_ids", all(t >= 0 for t in self.stop_token_ids), "token ids >= 0")
        check("stop", all(self.stop), "non-empty strings")
        check("repetition_penalty", 0.0 < self.repetition_penalty < float("inf"), "a finite number > 0")
        check("presence_penalty", -2.0 <= self.presence_penalty <= 2.0, "in [-2, 2]")
        check("frequency_penalty", -2.0 <= self.frequency_penalty <= 2.0, "in [-2, 2]")
        check("noise_scheme", self.noise_scheme == NOISE_SCHEME, f"this version knows only {NOISE_SCHEME!r}")

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for msgpack and JSON."""
        out = asdict(self)
        out["stop_token_ids"] = list(self.stop_token_ids)
        out["stop"] = list(self.stop)
        return out

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> SamplingParams:
        """The inverse of `to_dict`.

        Raises:
            BadSampling: an unknown field. Ignoring it would sample from another distribution than was asked for.
        """
        known = {f.name for f in fields(cls)}
        if unknown := sorted(set(raw) - known):
            raise BadSampling(
                problem(
                    f"unknown sampling parameters {unknown}",
                    consequence="Ignoring them would sample from another distribution than the one asked for",
                    remedy=f"Use only {sorted(known)}",
                )
            )
        return cls(**raw)


def _plain(kind: str, value: Any) -> Any:
    """A value as Python's own type of this kind, if it is one."""
    if kind in _SCALARS:
        plain = _SCALARS[kind](value)
        if plain != value and not (kind == "float" and math.isnan(plain)):  # "5" is no number, NaN is one
            raise TypeError
        return plain
    if isinstance(value, str):  # a sequence of strings too, and never meant as one
        raise TypeError
    return tuple(_plain(_TUPLES[kind].__name__, v) for v in value)
