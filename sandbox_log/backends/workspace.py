"""The directory that a sandbox can write to: made from a base, saved and brought back.

Where this process may mount, it is an overlay: the base stays untouched below, and a snapshot holds only what differs
from it. Everywhere else it is a copy (sharing blocks with the base where the file system can), and says so.
"""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
from pathlib import Path

from ..effects import tree_digest
from ..errors import IsolationUnavailable, StateLost, problem
from .local import remove_tree


class Workspace:
    """A writable tree under `directory`.

    Args:
        directory: holds everything of it: upper, work, merged, tree, snapshots.
        base: what it begins as; None for empty. Never written to.
        owner: user and group id that commands run as.

    Raises:
        IsolationUnavailable: the base cannot be copied.
    """

    def __init__(self, directory: Path, base: Path | None, owner: int) -> None:
        self._directory = directory
        self._owner = owner
        self._upper, self._work = directory / "upper", directory / "work"
        self._base = base if base is not None else directory / "base"
        if base is None:
            self._base.mkdir(exist_ok=True)
            self._give(self._base)
        why_not = self._overlay_obstacle()
        if why_not is None:
            self.path, self.kind = directory / "merged", "overlay"
        else:
            self.path, self.kind = directory / "tree", f"copy ({why_not})"
            self._prepare_copy()

    @property
    def _is_overlay(self) -> bool:
        return self.kind == "overlay"

    def snapshot(self) -> str:
        """Save it under a new name. Nothing may be writing to it."""
        name = secrets.token_hex(8)
        final = self._directory / "snapshots" / name
        half = final.with_name(f"{name}.tmp")
        half.mkdir(parents=True)
        _copy(self._upper if self._is_overlay else self.path, half / "tree")
        (half / "digest").write_text(tree_digest(half / "tree").hex())
        half.rename(final)
        return name

    def check(self, name: str) -> None:
        """See that there is such a snapshot. The workspace may be in use.

        Raises:
            StateLost: there is none, or it is not what was saved.
        """
        saved = self._directory / "snapshots" / name
        try:
            whole = tree_digest(saved / "tree").hex() == (saved / "digest").read_text()
        except OSError:
            whole = False
        if not whole or "/" in name:
            raise StateLost(
                problem(
                    f"the snapshot {name!r} is not there, or is damaged",
                    consequence="The workspace is as it was before",
                    remedy="Re-execute the logged commands in a new sandbox instead",
                )
            )

    def restore(self, name: str) -> None:
        """Bring it back to a snapshot that `check` found. Nothing may be using it."""
        target = self._upper if self._is_overlay else self.path
        fresh = self._directory / "restored"
        remove_tree(fresh)
        _copy(self._directory / "snapshots" / name / "tree", fresh)
        self.unmount()
        remove_tree(target)
        fresh.rename(target)
        if self._is_overlay:
            self._mount()

    def unmount(self) -> None:
        """Release the overlay, if it is one. `_mount` brings it back."""
        if self._is_overlay and os.path.ismount(self.path):
            subprocess.run(["umount", str(self.path)], check=True, capture_output=True)

    def _overlay_obstacle(self) -> str | None:
        """Make the overlay, or say why that is impossible."""
        if os.geteuid() != 0:
            return "only root can mount an overlay here"
        if any(char in str(path) for path in (self._base, self._directory) for char in ":,\\"):
            return "an overlay's paths cannot hold colons, commas or backslashes"
        if self._base.stat().st_uid != self._owner:
            return f"the base does not belong to user {self._owner}"
        if os.path.ismount(self._directory / "merged"):
            return None  # left by a process that died; it is the same overlay
        try:
            self._mount()
        except subprocess.CalledProcessError as error:
            return f"mount: {error.stderr.decode(errors='replace').strip()}"
        return None

    def _mount(self) -> None:
        merged = self._directory / "merged"
        if self._work.exists():
            remove_tree(self._work)
        for path in (self._upper, self._work, merged):
            path.mkdir(exist_ok=True)
            self._give(path)
        options = f"lowerdir={self._base},upperdir={self._upper},workdir={self._work}"
        subprocess.run(
            ["mount", "-t", "overlay", "overlay", "-o", options, str(merged)], check=True, capture_output=True
        )

    def _prepare_copy(self) -> None:
        if self.path.exists():
            return
        half = self._directory / "tree.tmp"
        if half.exists():
            remove_tree(half)
        try:
            _copy(self._base, half)
            self._give(half, recursive=True)
        except subprocess.CalledProcessError as error:
            raise IsolationUnavailable(
                problem(
                    f"the base {self._base} cannot be copied: {error.stderr.decode(errors='replace').strip()}",
                    consequence="The sandbox was not made",
                    remedy="Make the base readable for this user, and see that there is room",
                )
            ) from error
        half.rename(self.path)

    def _give(self, path: Path, *, recursive: bool = False) -> None:
        if os.geteuid() != 0:
            return
        if recursive:
            owner = f"{self._owner}:{self._owner}"
            subprocess.run(["chown", "-R", "-h", owner, "--", str(path)], check=True, capture_output=True)
        else:
            os.chown(path, self._owner, self._owner)


def _copy(source: Path, target: Path) -> None:
    program = shutil.which("cp")
    assert program is not None
    subprocess.run([program, "-a", "--reflink=auto", "--", str(source), str(target)], check=True, capture_output=True)
