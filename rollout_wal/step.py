"""The step record: one engine step, all running requests, as columns.

    header   rows u32, tokens u32, columns u8, flags u8, reserved u16           12 bytes
    columns  for each: id u8, dtype u8, width u8, flags u8                        4 bytes each
    token    u32 [tokens]
    columns  each [tokens * width] of its dtype, in the order of the list
    slot     u16 [rows]
    count    u16 [rows], only with FLAG_COUNTS; without it every row has one token
    finish   u8 [rows]: FinishReason, which belongs to the row's last token

A reader skips a column whose id it does not know: its size follows from dtype and width. So a step of N requests with
one logprob takes 11 bytes per token and 56 bytes beside (frame header included), with both logprobs 15 and 60.

Shape legend: R = rows (requests) of the step, N = its tokens (N = R unless an engine yields several per step).
"""

from __future__ import annotations

import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from .errors import BadInput, LogCorruptInput, problem

_HEADER: Final = struct.Struct("<IIBBH")
_COLUMN: Final = struct.Struct("<BBBB")
FLAG_COUNTS: Final = 1

LOGPROB: Final = 1
SAMPLING_LOGPROB: Final = 2
FIRST_NAMED_COLUMN: Final = 16
"""Ids from here on are given to named columns by Column records of the same log."""

DTYPES: Final[tuple[np.dtype[Any], ...]] = tuple(
    np.dtype(name) for name in ("<f4", "<f2", "<u1", "<u2", "<u4", "<i4", "<i8", "<f8", "<i2")
)
DTYPE_CODE: Final = {dtype: code for code, dtype in enumerate(DTYPES)}
_U16, _U32, _U8, _F32 = np.dtype("<u2"), np.dtype("<u4"), np.dtype("<u1"), np.dtype("<f4")
_ONE = _COLUMN.pack(LOGPROB, 0, 1, 0)
_BOTH = _ONE + _COLUMN.pack(SAMPLING_LOGPROB, 0, 1, 0)


def encode_step(
    slot_R: NDArray[np.uint16],
    token_N: NDArray[np.uint32],
    finish_R: NDArray[np.uint8],
    logprob_N: NDArray[np.float32] | None = None,
    sampling_logprob_N: NDArray[np.float32] | None = None,
    *,
    count_R: NDArray[np.uint16] | None = None,
    named: Mapping[int, NDArray[Any]] | None = None,
) -> bytes:
    """The payload of a step record. No Python loop over requests, and no copy but the join.

    Args:
        named: column id (16..255) to array [N] or [N, width] of a dtype in DTYPES.

    Raises:
        BadInput: a wrong dtype or length; the message names the column. NaN is looked for by the reader of the
            logprobs that depends on them, not here: it costs a pass over the data.
    """
    rows, tokens = len(slot_R), len(token_N)
    columns: list[NDArray[Any]] = [token_N]
    if sampling_logprob_N is not None and logprob_N is not None:
        descriptors, n_columns = _BOTH, 2
        columns += (logprob_N, sampling_logprob_N)
    elif logprob_N is not None:
        descriptors, n_columns = _ONE, 1
        columns.append(logprob_N)
    else:
        descriptors, n_columns = b"", 0
    if (
        slot_R.dtype != _U16
        or token_N.dtype != _U32
        or finish_R.dtype != _U8
        or len(finish_R) != rows
        or any(c.dtype != _F32 or len(c) != tokens for c in columns[1:])
        or (count_R is None and tokens != rows)
    ):
        raise BadInput(_mismatch(slot_R, token_N, finish_R, logprob_N, sampling_logprob_N))
    if named:
        for column_id, column in named.items():
            code = DTYPE_CODE.get(column.dtype)
            width = column.shape[1] if column.ndim == 2 else 1
            fits = len(column) == tokens and 0 < width < 256 and FIRST_NAMED_COLUMN <= column_id < 256
            if code is None or not fits:
                raise BadInput(
                    problem(
                        f"column {column_id} of a step has dtype {column.dtype} and shape {column.shape}",
                        consequence="The step was not logged",
                        remedy=f"Use an id of 16..255, a dtype of {[d.name for d in DTYPES]} and a shape of [{tokens}] "
                        f"or [{tokens}, at most 255]; wider values go into several columns",
                    )
                )
            descriptors += _COLUMN.pack(column_id, code, width, 0)
            columns.append(column)
            n_columns += 1
    flags = FLAG_COUNTS if count_R is not None else 0
    parts: list[Any] = [_HEADER.pack(rows, tokens, n_columns, flags, 0), descriptors, *columns, slot_R]
    if count_R is not None:
        parts.append(count_R)
    parts.append(finish_R)
    return b"".join(parts)


def _mismatch(*columns: NDArray[Any] | None) -> str:
    seen = [f"{c.dtype}[{len(c)}]" if c is not None else "none" for c in columns]
    return problem(
        f"the columns (slot, token, finish, logprob, sampling_logprob) of a step are {', '.join(seen)}",
        consequence="The step was not logged",
        remedy="Pass uint16, uint32, uint8, float32, float32; one slot and finish per row, "
        "the others one per token, and count_R where they differ",
    )


@dataclass(frozen=True, slots=True)
class Step:
    """A decoded step. The arrays are views of the payload."""

    slot_R: NDArray[np.uint16]
    token_N: NDArray[np.uint32]
    finish_R: NDArray[np.uint8]
    logprob_N: NDArray[np.float32] | None = None
    sampling_logprob_N: NDArray[np.float32] | None = None
    count_R: NDArray[np.uint16] | None = None
    named: dict[int, NDArray[Any]] = field(default_factory=dict)


def decode_step(payload: memoryview | bytes) -> Step:
    """The inverse of `encode_step`; unknown columns come back under their id.

    Raises:
        LogCorruptInput: the payload is not a step. The frame's CRC has been checked, so this is a writer's defect.
    """
    size = len(payload)
    if size < _HEADER.size:
        raise _corrupt(size)
    rows, tokens, n_columns, flags, _ = _HEADER.unpack_from(payload)
    at = _HEADER.size + _COLUMN.size * n_columns
    # Sizes are added up before any array is made: no input makes this allocate anything.
    if at > size:
        raise _corrupt(size)
    token = at
    at += 4 * tokens
    placed: list[tuple[int, np.dtype[Any], int, int]] = []
    for index in range(n_columns):
        column_id, code, width, _ = _COLUMN.unpack_from(payload, _HEADER.size + _COLUMN.size * index)
        if code >= len(DTYPES) or width == 0:
            raise _corrupt(size)
        placed.append((column_id, DTYPES[code], width, at))
        at += DTYPES[code].itemsize * width * tokens
    slot = at
    at += 2 * rows
    counts = at
    if flags & FLAG_COUNTS:
        at += 2 * rows
    elif tokens != rows:
        raise _corrupt(size)
    finish = at
    if finish + rows != size:
        raise _corrupt(size)
    count_R = np.frombuffer(payload, _U16, rows, counts) if flags & FLAG_COUNTS else None
    if count_R is not None and int(count_R.sum(dtype=np.int64)) != tokens:
        raise _corrupt(size)
    logprob = sampling = None
    named: dict[int, NDArray[Any]] = {}
    for column_id, dtype, width, offset in placed:
        column = np.frombuffer(payload, dtype, tokens * width, offset)
        if column_id == LOGPROB and width == 1:
            logprob = column
        elif column_id == SAMPLING_LOGPROB and width == 1:
            sampling = column
        else:
            named[column_id] = column.reshape(tokens, width) if width > 1 else column
    return Step(
        np.frombuffer(payload, _U16, rows, slot),
        np.frombuffer(payload, _U32, tokens, token),
        np.frombuffer(payload, _U8, rows, finish),
        logprob,
        sampling,
        count_R,
        named,
    )


def _corrupt(size: int) -> LogCorruptInput:
    return LogCorruptInput(
        problem(
            f"a step record of {size} bytes does not add up",
            consequence="Its tokens cannot be read",
            remedy="Report this with the log: the frame around it is intact, so the writer is at fault",
        )
    )
