"""What every sandbox on this machine must do, and the exec-once wrapper that they stand on."""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from sandbox_log import exec_once
from sandbox_log.backends.bubblewrap import BubblewrapSandbox
from sandbox_log.backends.local import LocalSandbox
from sandbox_log.effects import TreeWatch, tree_digest
from sandbox_log.errors import LogFenced, NotStarted, StateLost, TransportLost
from sandbox_log.events import End
from sandbox_log.sandbox import Call, Operation, ProbeState, Result

AnySandbox = LocalSandbox | BubblewrapSandbox
Make = Callable[..., AnySandbox]


def execute(command: str, stdin: bytes = b"", timeout_s: float = 20.0, **options: object) -> Call:
    return Call(Operation.EXEC, {"command": command}, stdin, timeout_s=timeout_s, **options)  # type: ignore[arg-type]


def shell(command: str, timeout_s: float = 20.0, session: str = "main") -> Call:
    return Call(Operation.SHELL, {"command": command, "session": session}, timeout_s=timeout_s)


def run_all(sandbox: AnySandbox, *calls: Call) -> list[Result]:
    async def main() -> list[Result]:
        try:
            return [await sandbox.run(call, f"id-{n}") for n, call in enumerate(calls)]
        finally:
            await sandbox.close()

    return asyncio.run(asyncio.wait_for(main(), 60))


def test_status_streams_stdin_directory_and_environment(make_sandbox: Make) -> None:
    results = run_all(
        make_sandbox(),
        execute("echo out; echo err >&2; exit 7"),
        execute("cat; printf '\\377\\000'", stdin=bytes(range(256)) * 100),
        execute("mkdir -p sub; pwd"),
        execute("pwd; echo $K $HOME_OF_NOBODY", cwd="sub", env={"K": "a b"}),
        execute("kill -9 $$"),
        execute("cat", stdin=b""),
        execute("true\nfalse"),
    )
    assert (results[0].end, results[0].exit_status) == (End.EXITED, 7)
    assert (results[0].stdout, results[0].stderr) == (b"out\n", b"err\n")
    assert results[1].stdout == bytes(range(256)) * 100 + b"\xff\x00"
    home = results[2].stdout.strip()
    assert results[3].stdout == home + b"/sub\na b\n"
    assert (results[4].end, results[4].signal) == (End.SIGNALLED, 9)
    assert results[5].stdout == b""
    assert results[6].exit_status == 1


def test_files_are_bytes_and_large_ones_too(make_sandbox: Make) -> None:
    data = os.urandom(1_500_000)
    path = "deep/er/ü -x"
    results = run_all(
        make_sandbox(),
        Call(Operation.WRITE_FILE, {"path": path}, data),
        Call(Operation.READ_FILE, {"path": path}),
        Call(Operation.READ_FILE, {"path": "absent"}),
        execute("wc -c <'deep/er/ü -x'"),
    )
    assert results[0].ok
    assert results[1].stdout == data
    assert results[2].exit_status != 0
    assert b"absent" in results[2].stderr
    assert results[3].stdout.strip() == b"1500000"


def test_effects_say_what_changed(make_sandbox: Make) -> None:
    results = run_all(
        make_sandbox(),
        execute("mkdir d; echo 1 >d/a; echo 2 >b; ln -s /etc/passwd link; mkfifo pipe"),
        execute("echo longer >b; rm d/a; chmod 600 b"),
        execute("true"),
    )
    changed = [{effect.path: effect.change for effect in result.effects or ()} for result in results]
    assert changed[0] == {"d": "created", "d/a": "created", "b": "created", "link": "created", "pipe": "created"}
    assert changed[1] == {"b": "modified", "d/a": "deleted"}
    assert changed[2] == {}
    digests = {effect.path: effect.digest for effect in results[0].effects or ()}
    assert digests["link"] is None, "a link is not followed"
    assert digests["b"] is not None


@pytest.mark.parametrize(
    "command",
    [
        "sleep 60",
        "trap '' TERM INT HUP; while :; do sleep 1; done",
        "setsid sh -c 'setsid sleep 60 & sleep 60' & sleep 60",
        "(sleep 60 &) ; sleep 60",
    ],
)
def test_a_timeout_kills_the_whole_tree(make_sandbox: Make, command: str) -> None:
    marker = f"6{time.time_ns() % 10**8}"
    sandbox = make_sandbox()
    (result,) = run_all(
        sandbox, execute(f"echo before; {command.replace('sleep 60', f'sleep {marker}')}", timeout_s=0.6)
    )
    assert result.end is End.TIMED_OUT
    assert result.stdout == b"before\n"
    deadline = time.monotonic() + 5
    while _processes(marker) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert _processes(marker) == []


def _processes(marker: str) -> list[bytes]:
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = path.read_bytes()
        except OSError:
            continue
        if f"sleep\0{marker}".encode() in line:
            found.append(line)
    return found


def test_output_beyond_the_limit_ends_the_command_and_what_was_written_is_kept(make_sandbox: Make) -> None:
    limit = 1 << 20
    (result, after) = run_all(make_sandbox(file_bytes_max=limit), execute("yes"), execute("echo fine"))
    assert result.end is End.OUTPUT_LIMIT
    assert result.stdout == b"y\n" * (limit // 2)
    assert after.stdout == b"fine\n"


def test_a_shell_keeps_its_state_and_is_never_silently_replaced(make_sandbox: Make) -> None:
    results = run_all(
        make_sandbox(file_bytes_max=1 << 20),
        shell("mkdir d; cd d; X=4"),
        shell("basename $(pwd); echo $X; printf 'no newline'"),
        shell("if"),
        shell("echo a >&2; printf '\\377'; (exit 9)"),
        shell("cat; read line; echo [$line]"),
        shell("echo $X", session="other"),
        shell("exit 5"),
        shell("echo new$X"),
        shell("X=5; sleep 30", timeout_s=0.4),
        shell("echo $X."),
        shell("yes"),
        shell("echo $X."),
    )
    assert results[1].stdout == b"d\n4\nno newline"
    assert results[2].exit_status not in (0, None)
    assert (results[3].stdout, results[3].stderr, results[3].exit_status) == (b"\xff", b"a\n", 9)
    assert results[4].stdout == b"[]\n", "stdin of a command in a shell is empty"
    assert results[5].stdout == b"\n"
    assert (results[6].exit_status, len(results[6].notes)) == (5, 1)
    assert (results[7].stdout, results[7].notes) == (b"new\n", ())
    assert (results[8].end, len(results[8].notes)) == (End.TIMED_OUT, 1)
    assert results[9].stdout == b".\n"
    assert results[10].end is End.OUTPUT_LIMIT
    assert results[11].stdout == b".\n"


def test_what_cannot_be_started_says_so(make_sandbox: Make) -> None:
    async def main() -> None:
        sandbox = make_sandbox()
        with pytest.raises(NotStarted, match="too long"):
            await sandbox.run(execute("echo " + "x" * 3_000_000), "long")
        result = (
            await sandbox.run(execute("true", cwd="absent"), "nowhere")
            if isinstance(sandbox, BubblewrapSandbox)
            else None
        )
        assert result is None or result.exit_status != 0
        await sandbox.close()

    asyncio.run(main())


def test_an_exec_id_runs_once_however_often_it_is_asked_for(make_sandbox: Make) -> None:
    async def main() -> None:
        sandbox = make_sandbox()
        call = execute("sleep 0.3; echo ran >>count; echo done")
        results = await asyncio.gather(*(sandbox.run(call, "same") for _ in range(4)))
        assert {result.stdout for result in results} == {b"done\n"}
        assert (await sandbox.run(call, "same")).stdout == b"done\n"
        assert (await sandbox.run(execute("cat count"), "look")).stdout == b"ran\n"
        probe = await sandbox.probe(call, "same")
        assert probe.state is ProbeState.FINISHED
        assert probe.result is not None
        assert probe.result.stdout == b"done\n"
        await sandbox.close()

    asyncio.run(main())


def test_a_probe_bars_what_has_not_started(make_sandbox: Make) -> None:
    async def main() -> None:
        sandbox = make_sandbox()
        call = execute("echo ran >>count")
        assert (await sandbox.probe(call, "late")).state is ProbeState.NEVER_STARTED
        assert (await sandbox.probe(call, "late")).state is ProbeState.NEVER_STARTED
        with pytest.raises(LogFenced, match="barred"):
            await sandbox.run(call, "late")
        assert not (await sandbox.run(execute("cat count"), "look")).ok
        await sandbox.close()

    asyncio.run(main())


def test_a_client_that_gave_up_finds_its_command_again(make_sandbox: Make) -> None:
    async def main() -> None:
        sandbox = make_sandbox()
        call = execute("sleep 0.5; echo done")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(sandbox.run(call, "slow"), 0.2)
        assert (await sandbox.probe(call, "slow")).state is ProbeState.RUNNING
        while (probe := await sandbox.probe(call, "slow")).state is ProbeState.RUNNING:
            await asyncio.sleep(0.05)
        assert probe.result is not None
        assert probe.result.stdout == b"done\n"
        assert 0.3 < probe.result.duration_s < 10
        await sandbox.close()

    asyncio.run(main())


def test_a_wrapper_that_was_killed_leaves_a_command_that_died(ground: Path) -> None:
    async def main() -> None:
        sandbox = LocalSandbox(ground / "s")
        task = asyncio.create_task(sandbox.run(execute("sleep 20"), "x"))
        pid = ground / "s" / "state" / "x" / "pid"
        while not pid.exists() or not pid.read_text():
            await asyncio.sleep(0.01)
        os.kill(int(pid.read_text().split()[0]), signal.SIGKILL)
        with pytest.raises(TransportLost, match="left no status"):
            await task
        assert (await sandbox.probe(execute("sleep 20"), "x")).state is ProbeState.DIED
        await sandbox.close()

    asyncio.run(main())


def test_another_directory_or_boot_is_another_instance(ground: Path) -> None:
    one, same, other = (LocalSandbox(ground / name).info.instance for name in ("s", "s", "t"))
    assert one == same != other
    token, _, boot = one.partition(".")
    assert len(token) == 32
    assert boot == Path("/proc/sys/kernel/random/boot_id").read_text().strip()


@pytest.mark.parametrize("program", ["dash", "bash", "busybox"])
def test_the_wrapper_is_portable(ground: Path, program: str) -> None:
    path = shutil.which(program)
    if path is None:
        pytest.skip(f"{program} is not installed")
    start = [path, "sh"] if program == "busybox" else [path]

    def run(verb: str, *rest: str) -> str:
        argv = [*start, *exec_once.argv(verb, str(ground / "state"), *rest)[1:]]
        return subprocess.run(argv, cwd=ground, capture_output=True, text=True, check=False, timeout=20).stdout

    instance = exec_once.parse_instance(run("init"))
    assert exec_once.parse_instance("Welcome!\r\n" + run("init")) == instance

    def parse(output: str) -> exec_once.Probe:
        return exec_once.parse_probe(output, duration_s=0.0, file_bytes_max=1 << 20)

    limit = exec_once.blocks(1 << 20)
    done = parse(run("fetch", "one", limit, "sh", "-c", "printf '\\377\\n'; echo err >&2; echo x >>n; exit 3"))
    assert done.result is not None
    assert (done.result.exit_status, done.result.stdout, done.result.stderr) == (3, b"\xff\n", b"err\n")
    assert parse(run("fetch", "one", limit, "sh", "-c", "echo never")).result == done.result
    assert parse(run("probe", "two")).state is ProbeState.NEVER_STARTED
    assert parse(run("fetch", "two", limit, "echo", "never")).state is ProbeState.NEVER_STARTED
    flood = parse(run("fetch", "three", exec_once.blocks(4096), "sh", "-c", "while :; do echo flood; done"))
    assert flood.result is not None
    assert len(flood.result.stdout) == 4096


@pytest.mark.parametrize(
    "output", ["", "noise", "exec-once/1", "exec-once/1\nfinished 0\nstdout base64\nYQ", "exec-once/1\nodd\n",
               "exec-once/1\nfinished 0\nstdout base64\n!!\n.\nstderr base64\n.\n", "exec-once/1\nfinished x\na b\n.\n"]
)  # fmt: skip
def test_garbled_answers_are_no_answers(output: str) -> None:
    with pytest.raises(TransportLost, match="not the wrapper's"):
        exec_once.parse_probe(output, duration_s=0.0, file_bytes_max=1 << 20)


# -- snapshots


def test_snapshots_bring_the_workspace_back(bubblewrap: Make, ground: Path) -> None:
    async def main() -> None:
        base = ground / "base"
        base.mkdir()
        (base / "from-base").write_text("base\n")
        sandbox = bubblewrap(base=base)
        run = iter(range(100))

        async def do(command: str) -> bytes:
            return (await sandbox.run(execute(command), f"id-{next(run)}")).stdout

        assert await do("cat from-base; echo 1 >mine; echo changed >from-base; ln -s /nowhere link") == b"base\n"
        first = await sandbox.snapshot()
        assert first is not None
        await do("rm from-base mine; echo 2 >other")
        second = await sandbox.snapshot()
        assert second is not None
        await sandbox.restore(first)
        assert await do("cat mine from-base; readlink link; ls other") == b"1\nchanged\n/nowhere\n"
        await sandbox.restore(second)
        assert await do("ls") == b"link\nother\n"
        assert (base / "from-base").read_text() == "base\n", "the base is never written to"
        (saved,) = (ground / "sandbox" / "snapshots" / first).glob("*/mine")
        saved.write_text("tampered")
        for name in (first, "absent", "../base"):
            with pytest.raises(StateLost, match="not there, or is damaged"):
                await sandbox.restore(name)
        assert await do("ls") == b"link\nother\n"
        await sandbox.close()

    asyncio.run(main())


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts overlays and changes owners")
def test_root_uses_an_overlay_where_the_base_belongs_to_the_sandbox_and_says_so(bubblewrap: Make, ground: Path) -> None:
    async def main() -> None:
        base = ground / "base"
        base.mkdir()
        (base / "file").write_text("x")
        copied = bubblewrap("copied", base=base)
        assert copied.info.isolation["workspace"].startswith("copy (the base does not belong to user")
        assert (await copied.run(execute("echo y >file; cat file"), "a")).stdout == b"y\n"
        await copied.close()
        for path in (base, base / "file"):
            os.chown(path, 65534, 65534)
        laid = bubblewrap("laid", base=base)
        if not laid.info.isolation["workspace"].startswith("overlay"):
            await laid.close()
            pytest.skip(f"no overlay here: {laid.info.isolation['workspace']}")
        assert (await laid.run(execute("echo y >file; cat file"), "a")).stdout == b"y\n"
        assert (base / "file").read_text() == "x"
        await laid.close()
        again = bubblewrap("laid", base=base)
        assert (await again.run(execute("cat file"), "b")).stdout == b"y\n"
        assert again.info.instance == laid.info.instance
        await again.delete()
        assert not (ground / "laid").exists()

    asyncio.run(main())


# -- the tree watch, on hostile ground


def test_a_tree_that_cannot_be_known_is_not_guessed_at(ground: Path) -> None:
    root = ground / "tree"
    root.mkdir()
    watch = TreeWatch(root, entries_max=20)
    watch.reset()
    for n in range(30):
        (root / str(n)).touch()
    assert watch.changes() is None
    for n in range(30):
        (root / str(n)).unlink()
    assert watch.changes() is None
    assert watch.changes() == ()
    deep = root
    for _ in range(70):
        deep = deep / "d"
    deep.mkdir(parents=True)
    assert TreeWatch(root)._scan() is None
    with pytest.raises(OSError, match="too deep"):
        tree_digest(root)


def test_a_tree_digest_sees_content_mode_links_and_names(ground: Path) -> None:
    root = ground / "tree"
    root.mkdir()
    seen = {tree_digest(root)}
    for change in (
        lambda: (root / "a").write_text("x"),
        lambda: (root / "a").write_text("y"),
        lambda: (root / "a").chmod(0o600),
        lambda: (root / "a").rename(root / "b"),
        lambda: (root / "l").symlink_to("b"),
        lambda: ((root / "l").unlink(), (root / "l").symlink_to("c")),
        (root / os.fsdecode(b"\xff")).mkdir,
    ):
        change()
        seen.add(tree_digest(root))
    assert len(seen) == 8
