"""Commands under bubblewrap: no network, no capabilities, an unprivileged user, a read-only system.

Every command gets namespaces of its own, so that nothing of it is left when it ends: /tmp and the home directory are
new each time, and what lasts is the workspace. That is also exactly what a snapshot holds and what re-execution
rebuilds. A persistent shell is one such command that lasts.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from ..sandbox import Call, Result, SandboxInfo
from .cgroups import ControlGroups
from .host import HostRunner
from .isolation import HOME, INNER_UID, WORKSPACE, Jail, Limits, find_bubblewrap
from .local import remove_tree, script_of
from .machine import MachineSandbox
from .sessions import ShellSession
from .workspace import Workspace

#: bash is the better company in a session; what is in the image is asked when it begins.
_SESSION = "command -v bash >/dev/null && exec bash --norc --noprofile; exec sh"
#: A session is not under the wrapper, and joins its control groups by itself.
_JOIN = 'for group in $EXEC_ONCE_CGROUPS; do echo 0 >"$group/cgroup.procs" || exit 125; done; exec "$@"'


class BubblewrapSandbox(MachineSandbox):
    """An isolated sandbox on this machine. Whatever of the isolation cannot be had, it refuses to be made without.

    Args:
        directory: holds the workspace, its snapshots, and the state of the exec-once wrapper, which commands
            cannot reach. Open the same directory again to reattach. As root, every parent directory must be
            one that others can enter.
        base: directory that the workspace begins as; None for empty. Never written to. As root it is shared
            by an overlay if it belongs to `uid`, and copied otherwise.
        image: root file system, mounted read-only; None for this machine's own /usr.
        image_digest: what the log calls the image; None computes one for this machine's system and says no
            more of another image than its path.
        env: environment of every command, on top of PATH, HOME and LANG.
        limits: see `Limits`.
        uid: of the host that commands run as, when this process is root; its own otherwise.
        effects: look at the workspace before and after each command and report what it changed.

    Raises:
        IsolationUnavailable: see above; the message says what is missing.
    """

    def __init__(
        self,
        directory: Path,
        *,
        base: Path | None = None,
        image: Path | None = None,
        image_digest: str | None = None,
        env: Mapping[str, str] | None = None,
        limits: Limits | None = None,
        uid: int = 65534,
        effects: bool = True,
    ) -> None:
        program, version = find_bubblewrap()
        limits = limits or Limits()
        uid = uid if os.geteuid() == 0 else os.geteuid()
        directory = directory.absolute()
        directory.mkdir(parents=True, exist_ok=True)
        self._directory = directory
        self._limits = limits
        self._env = {"PATH": "/usr/local/bin:/usr/bin:/bin", "HOME": HOME, "LANG": "C.UTF-8", **(env or {})}
        runner = HostRunner(directory / "state", file_bytes_max=limits.file_bytes_max, namespaced=True)
        self._workspace = Workspace(directory, base, uid)
        self._cgroups = ControlGroups.create(memory_bytes=limits.memory_bytes, processes=limits.processes)
        self._jail = Jail(
            program=program,
            uid=uid,
            image=image,
            workspace=self._workspace.path,
            etc=_make_etc(directory / "etc"),
            limits=limits,
            address_space="memory" not in self._cgroups.bounded,
        )
        try:
            found = self._jail.prove(directory / "state")
        except BaseException:
            self._release()
            raise
        super().__init__(runner, self._workspace.path if effects else None)
        self.info = SandboxInfo(
            backend="bubblewrap",
            image_digest=image_digest if image_digest is not None else _image_digest(image),
            isolation={**found, "workspace": self._workspace.kind, **self._bounds()},
            versions={"bubblewrap": version},
            instance=runner.instance,
        )

    async def snapshot(self) -> str | None:
        """Save the workspace. Processes of open shell sessions are not in it."""
        return await asyncio.to_thread(self._workspace.snapshot)

    async def restore(self, snapshot: str) -> None:
        """Bring the workspace back; open shell sessions end, for they would look at what is no more."""
        await asyncio.to_thread(self._workspace.check, snapshot)
        await self._close_sessions()
        await asyncio.to_thread(self._workspace.restore, snapshot)
        if self._watch is not None:
            self._watch.reset()

    async def close(self) -> None:
        """Kill what this object started and what still runs, and release its mount and control groups."""
        await super().close()
        await asyncio.to_thread(self._release)

    async def delete(self) -> None:
        """Close it and remove its directory, snapshots included."""
        await self.close()
        await asyncio.to_thread(remove_tree, self._directory)

    def _release(self) -> None:
        self._cgroups.remove()
        self._workspace.unmount()

    def _cwd(self, call: Call) -> str:
        return os.path.join(WORKSPACE, call.cwd) if call.cwd else WORKSPACE

    async def _run_command(self, call: Call, exec_id: str) -> Result:
        command = ["/bin/sh", "-c", *script_of(call)]
        return await self._runner.run(
            self._jail.argv(command, {**self._env, **call.env}, self._cwd(call)),
            exec_id,
            stdin=call.stdin,
            timeout_s=call.timeout_s,
            env={"PATH": os.environ.get("PATH", os.defpath)},  # of bwrap; the command's is in its arguments
            cgroups=self._cgroups.directories,
        )

    def _open_session(self) -> ShellSession:
        command = self._jail.argv(["/bin/sh", "-c", _SESSION], self._env, WORKSPACE)
        groups = " ".join(map(str, self._cgroups.directories))
        return ShellSession(
            ["/bin/sh", "-c", _JOIN, "join", *command],
            env={"PATH": os.environ.get("PATH", os.defpath), "EXEC_ONCE_CGROUPS": groups},
            cwd=None,
            output_bytes_max=self._limits.file_bytes_max,
            namespaced=True,
        )

    def _bounds(self) -> dict[str, str]:
        limits, groups = self._limits, self._cgroups
        per_process = "resource limit, each process"
        return {
            "memory": f"{limits.memory_bytes} bytes, "
            + (f"{groups.version}, whole sandbox" if "memory" in groups.bounded else f"address space, {per_process}"),
            "processes": f"{limits.processes}, "
            + (f"{groups.version} and resource limit" if "pids" in groups.bounded else "resource limit"),
            "cpu": f"{limits.cpu_s} s, {per_process}",
            "files": f"{limits.file_bytes_max} bytes each, {limits.open_files} open, {per_process}",
            "disk": "the total in the workspace is not bounded",
        }


def _make_etc(directory: Path) -> Path:
    """The few files that programs look for, with nothing of this machine's users or hosts in them."""
    directory.mkdir(exist_ok=True)
    user = f"agent:x:{INNER_UID}:{INNER_UID}::{HOME}:/bin/sh\nnobody:x:65534:65534::/:/usr/sbin/nologin\n"
    texts = {
        "passwd": user,
        "group": f"agent:x:{INNER_UID}:\nnogroup:x:65534:\n",
        "hosts": "127.0.0.1 localhost sandbox\n::1 localhost\n",
        "nsswitch.conf": "passwd: files\ngroup: files\nhosts: files\n",
    }
    for name, text in texts.items():
        (directory / name).write_text(text)
    for name in ("alternatives", "ld.so.cache", "localtime"):
        source, target = Path("/etc", name), directory / name
        if target.exists() or not source.exists():
            continue
        with contextlib.suppress(OSError):
            if source.is_dir():
                shutil.copytree(source, target, symlinks=True)
            else:
                shutil.copyfile(source, target)
    return directory


def _image_digest(image: Path | None) -> str:
    if image is not None:
        return f"path:{image}"
    try:
        release = Path("/etc/os-release").read_bytes()
    except OSError:
        release = b""
    return "os-release:" + hashlib.blake2b(release, digest_size=16).hexdigest()
