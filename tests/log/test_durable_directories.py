"""Directories that a crash of the machine cannot lose. There are three makers of them, and all must do the same."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rollout_wal.dataset.storage import Storage
from rollout_wal.log.storage import make_dirs_durable
from sandbox_log import directories as sandbox_directories

MAKERS: dict[str, Callable[[Path], None]] = {
    "log": make_dirs_durable,
    "dataset": lambda path: Storage().make_directory(path),
    "sandbox log": sandbox_directories.make_directory,
}


@pytest.fixture(params=MAKERS)
def make(request: pytest.FixtureRequest) -> Callable[[Path], None]:
    return MAKERS[request.param]


@pytest.fixture
def synced(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Every directory that was synced, in order."""
    paths: list[Path] = []

    def note(fd: int) -> None:
        paths.append(Path(os.readlink(f"/proc/self/fd/{fd}")))

    monkeypatch.setattr(os, "fsync", note)
    return paths


@pytest.fixture
def file_systems(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The directories whose whole file systems were synced."""
    paths: list[Path] = []
    for module in ("rollout_wal.log.storage", "sandbox_log.directories"):
        monkeypatch.setattr(f"{module}._sync_file_system", paths.append)
    return paths


def unreadable(monkeypatch: pytest.MonkeyPatch, path: Path, *, writable: bool) -> None:
    """Make it look as a directory of mode 0333, or 0111, does to a user; the user of a test may be root."""
    real_open, real_access = os.open, os.access

    def fake_open(name: str | Path, *arguments: int) -> int:
        if Path(name) == path:
            raise PermissionError(13, "Permission denied", str(name))
        return real_open(name, *arguments)

    monkeypatch.setattr(os, "open", fake_open)
    monkeypatch.setattr(os, "access", lambda name, mode: writable if Path(name) == path else real_access(name, mode))


def test_names_that_are_there_already_are_synced_up_to_the_mount(
    make: Callable[[Path], None], synced: list[Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever made one may have died before its sync: it can be seen, and lost, and all that was acknowledged in it."""
    mount = tmp_path / "mount"
    (mount / "a").mkdir(parents=True)
    monkeypatch.setattr(os.path, "ismount", lambda path: Path(path) in (mount, Path("/")))
    make(mount / "a" / "b" / "c")
    assert (mount / "a" / "b" / "c").is_dir()
    assert synced == [mount / "a" / "b", mount / "a", mount]
    make(mount / "a" / "b" / "c")
    assert synced == [mount / "a" / "b", mount / "a", mount] * 2
    make(mount)
    assert len(synced) == 6


def test_names_are_synced_where_they_are_and_not_where_a_link_to_them_is(
    make: Callable[[Path], None], synced: list[Path], tmp_path: Path
) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "link").symlink_to("../elsewhere")
    make(tmp_path / "links" / "link" / "log")
    assert (tmp_path / "elsewhere" / "log").is_dir()
    assert synced[:2] == [tmp_path / "elsewhere", tmp_path]
    assert tmp_path / "links" not in synced


@pytest.mark.parametrize("writable", [True, False])
def test_a_parent_that_may_not_be_read_matters_only_to_whom_may_write_it(
    make: Callable[[Path], None],
    writable: bool,
    synced: list[Path],
    file_systems: list[Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    unreadable(monkeypatch, tmp_path, writable=writable)
    for _ in range(2):
        make(tmp_path / "new" / "log")
    assert file_systems == [tmp_path / "new" / "log"] * 2 * writable
    assert tmp_path / "new" in synced
    assert (tmp_path.parent in synced) is not writable


def test_one_file_system_is_synced_and_never_all_of_them(
    make: Callable[[Path], None], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(os, "sync", lambda: pytest.fail("another file system may hang"))
    unreadable(monkeypatch, tmp_path, writable=True)
    make(tmp_path / "log")
    assert (tmp_path / "log").is_dir()


@pytest.mark.parametrize("sync", ["rollout_wal.log.storage._libc", "sandbox_log.directories._libc"])
def test_a_file_system_that_cannot_be_synced_is_an_error(
    sync: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Broken:
        @staticmethod
        def syncfs(fd: int) -> int:
            return -1

    monkeypatch.setattr(sync, Broken)
    unreadable(monkeypatch, tmp_path, writable=True)
    with pytest.raises(OSError):
        MAKERS["log" if "rollout_wal" in sync else "sandbox log"](tmp_path / "log")


def test_a_maker_that_dies_before_its_sync_leaves_it_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "a" / "b"

    def die(_: Path) -> None:
        raise KeyboardInterrupt

    durable: set[Path] = set()
    with pytest.raises(KeyboardInterrupt):
        make_dirs_durable(path, die, durable)
    synced: list[Path] = []
    make_dirs_durable(path, synced.append, durable)
    assert synced[:2] == [tmp_path / "a", tmp_path]
    make_dirs_durable(path, die, durable)
    path.rmdir()
    with pytest.raises(KeyboardInterrupt):
        make_dirs_durable(path, die, durable)
