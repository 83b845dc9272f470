"""Copying out of payload files: mapped or read, the same bytes, and an error where there are none."""

from __future__ import annotations

import os
import subprocess
import sys
import uuid
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from rollout_wal.dataset import DatasetWriter, PlanSpec, Sample, open_dataset, payload_files, plan
from rollout_wal.dataset.copy_choice import CopyChoice
from rollout_wal.dataset.errors import DatasetDamaged
from rollout_wal.dataset.loader import Loader
from rollout_wal.dataset.payload_files import LONG_COPIES, MAPPED_BYTES_MIN, PayloadFile, PayloadFiles

SIZE = 1 << 20


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "payload.arrow"
    path.write_bytes(np.random.default_rng(0).integers(0, 256, SIZE, dtype=np.uint8).tobytes())
    return path


class Mapped(CopyChoice):
    """Never reads what can be mapped."""

    def copy(self, size: int, first: Callable[[], None], second: Callable[[], bool]) -> None:
        if not second():
            first()


def copied(file: PayloadFile, offset: int, size: int) -> bytes:
    target = bytearray(size)
    file.copy(offset, memoryview(target))
    return bytes(target)


@pytest.mark.parametrize("choice", [CopyChoice, Mapped])
def test_pieces_of_any_size_and_place_are_those_of_the_file(path: Path, choice: type[CopyChoice]) -> None:
    data = path.read_bytes()
    file = PayloadFile(path, choice())
    for size in (0, 1, 4096, MAPPED_BYTES_MIN - 1, MAPPED_BYTES_MIN, MAPPED_BYTES_MIN + 1, 500_001):
        for offset in (0, 1, 4095, 4096, 4097, SIZE - size):
            assert copied(file, offset, size) == data[offset : offset + size]
    assert copied(file, 0, SIZE) == data
    file.close()


def test_large_pieces_are_mapped_and_leave_no_page_behind(path: Path) -> None:
    file = PayloadFile(path, Mapped())
    copied(file, 5, MAPPED_BYTES_MIN - 1)
    assert str(path) not in Path("/proc/self/maps").read_text()
    copied(file, 5, MAPPED_BYTES_MIN)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    at = next(n for n, line in enumerate(lines) if line.endswith(str(path)))
    resident = next(line for line in lines[at:] if line.startswith("Rss:"))
    assert resident.split()[1] == "0"
    file.close()
    assert str(path) not in Path("/proc/self/maps").read_text()


def test_what_cannot_be_mapped_is_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a kernel that has no MADV_POPULATE_READ, or a file system without mappings."""
    data = path.read_bytes()
    monkeypatch.setattr(payload_files, "_MADV_POPULATE_READ", 9999)
    file = PayloadFile(path, Mapped())
    assert copied(file, 3, MAPPED_BYTES_MIN) == data[3 : 3 + MAPPED_BYTES_MIN]
    file.close()

    def refuse(*_: object, **__: object) -> None:
        raise OSError(19, "No such device")

    monkeypatch.setattr(payload_files.mmap, "mmap", refuse)
    file = PayloadFile(path, Mapped())
    assert copied(file, 3, MAPPED_BYTES_MIN) == data[3 : 3 + MAPPED_BYTES_MIN]
    file.close()


_CUT_SHORT = """
import os, sys
from pathlib import Path
from rollout_wal.dataset.copy_choice import CopyChoice
from rollout_wal.dataset.errors import DatasetDamaged
from rollout_wal.dataset.payload_files import PayloadFile
file = PayloadFile(Path(sys.argv[1]))
target = memoryview(bytearray(1 << 19))
assert file.copy_mapped(0, target)
os.truncate(sys.argv[1], 1 << 18)
assert not file.copy_mapped(0, target)
try:
    file.copy(0, target)
except DatasetDamaged as error:
    print(error)
"""


def test_a_file_cut_short_while_it_is_mapped_is_an_error_and_no_sigbus(path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", _CUT_SHORT, str(path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert str(path) in done.stdout
    assert "ends before byte" in done.stdout


def test_pieces_beyond_the_end_and_missing_files_are_damage(path: Path, tmp_path: Path) -> None:
    file = PayloadFile(path)
    for size in (10, MAPPED_BYTES_MIN):
        with pytest.raises(DatasetDamaged, match=r"ends before byte"):
            copied(file, SIZE - size + 1, size)
    file.close()
    (tmp_path / "empty").touch()
    empty = PayloadFile(tmp_path / "empty")
    with pytest.raises(DatasetDamaged, match=r"ends before byte"):
        copied(empty, 0, MAPPED_BYTES_MIN)
    empty.close()
    with pytest.raises(DatasetDamaged, match=r"No such file"):
        PayloadFile(tmp_path / "missing")


def test_only_so_many_files_stay_open(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(payload_files, "_OPEN_FILES_MAX", 3)
    for number in range(6):
        (tmp_path / f"{number}").write_bytes(bytes([number]) * MAPPED_BYTES_MIN)
    before = len(os.listdir("/proc/self/fd"))
    files = PayloadFiles(tmp_path)
    for number in [*range(6), 0, 5, 0]:
        assert copied(files[f"{number}"], 0, MAPPED_BYTES_MIN) == bytes([number]) * MAPPED_BYTES_MIN
    # Each has its own descriptor and, where Python duplicates it, the mapping's.
    assert len(os.listdir("/proc/self/fd")) - before <= 6


@pytest.mark.parametrize("own", [None, "glibc.malloc.check=0"])
def test_the_reader_runs_with_long_copies_unless_the_user_tunes_it(
    own: str | None, tmp_path: Path, make_sample: Callable[..., Sample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    if own:
        monkeypatch.setenv("GLIBC_TUNABLES", own)
    DatasetWriter(tmp_path / "data", writer_id="w").seal([make_sample(0, response=40_000)])
    plan(open_dataset(tmp_path / "data"), PlanSpec(token_budget=50_000)).write(tmp_path / "plan.arrow")
    with Loader(tmp_path / "data", tmp_path / "plan.arrow", name=uuid.uuid4().hex, local_ranks=1) as loader:
        batch = loader.next()
        assert batch is not None
        assert len(batch.samples[0].tokens.array("token_ids")) > 40_000 - 1
        environment = Path(f"/proc/{loader.reader_pid}/environ").read_bytes().split(b"\0")
    assert f"GLIBC_TUNABLES={own or LONG_COPIES['GLIBC_TUNABLES']}".encode() in environment
