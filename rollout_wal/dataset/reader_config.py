"""What all ranks of a node and their reader agree on."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import msgpack


@dataclass(frozen=True, slots=True)
class ReaderConfig:
    """What all ranks of a node must agree on.

    Args:
        name: of the reader; the same for all ranks of the node, and no other job's.
        dataset, plan: absolute paths.
        groups: column groups to load.
        need_all: a sample without one of them is an error.
        local_ranks: ranks on this node.
        data_ranks: the plan's ranks whose samples are loaded: those of this node.
        memory_bytes_max: shared memory, at most.
        prefetch_max: steps read ahead, at most.
        processes: that read and decompress; 0: as many as there are processors for the reader, up to 4.
        stop_on_rank_death: the other ranks get an error when one dies; else they carry on.
        start_timeout_s: how long to wait for all ranks to connect, counted from the last that did.
    """

    name: str
    dataset: str
    plan: str
    groups: tuple[str, ...]
    need_all: bool
    local_ranks: int
    data_ranks: tuple[int, ...]
    memory_bytes_max: int
    prefetch_max: int
    processes: int
    stop_on_rank_death: bool
    start_timeout_s: float

    def pack(self) -> bytes:
        return bytes(msgpack.packb(asdict(self)))

    @classmethod
    def unpack(cls, raw: bytes) -> ReaderConfig:
        values = msgpack.unpackb(raw)
        return cls(**{**values, "groups": tuple(values["groups"]), "data_ranks": tuple(values["data_ranks"])})
