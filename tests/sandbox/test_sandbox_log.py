"""The log on disk: order, chain, fencing, growth, poison, readers, blobs."""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
import subprocess
import sys
import textwrap
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lmdb
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sandbox_log.environment import file_system_of
from sandbox_log.errors import (
    BadCall,
    LogDamaged,
    LogFenced,
    LogInUse,
    LogPoisoned,
    LogTooNew,
    NetworkFileSystem,
    SandboxLogError,
    UnknownSandbox,
)
from sandbox_log.events import GENESIS, BlobRef, Event, Kind, blob_refs, canonical, decode, digest_of, encode
from sandbox_log.log import SandboxLog

HEADER = {"salt": b"0" * 16, "instance": "i"}
_plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**63), 2**64 - 1) | st.floats() | st.text() | st.binary(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=10,
)


@given(st.dictionaries(st.text(max_size=5), _plain, max_size=4), st.integers(0, 2**32), st.sampled_from(list(Kind)))
@settings(max_examples=60, deadline=None)
def test_an_event_survives_its_bytes_and_keys_have_one_order(body: dict, sequence: int, kind: Kind) -> None:
    event = Event(sequence, kind, 3, GENESIS, 1, body)
    raw = encode(event)
    back = decode(raw)
    assert encode(back) == raw
    assert back.digest == digest_of(raw)
    shuffled = dict(reversed(list(body.items())))
    assert encode(Event(sequence, kind, 3, GENESIS, 1, shuffled)) == raw


@pytest.mark.parametrize("value", [object(), 2**64, "\ud800", {1: 2}, {"a": {1: 2}}, 1j])
def test_what_msgpack_cannot_hold_exactly_is_refused(value: object) -> None:
    with pytest.raises(BadCall, match="Nothing was logged"):
        canonical({"x": value})


@pytest.mark.parametrize("raw", [b"", b"\x80", b"\xc1", b"\x93\x01\x02\x03", canonical({"seq": 1, "kind": "odd"})])
def test_bytes_that_are_no_event_are_damage(raw: bytes) -> None:
    with pytest.raises(LogDamaged, match="cannot be decoded"):
        decode(raw)


def test_events_come_back_in_order_and_chained(ground: Path) -> None:
    with SandboxLog(ground / "log") as log:
        writer = log.writer("a", HEADER)
        futures = [writer.append(Kind.STATE, {"n": n}) for n in range(2500)]
        assert [future.result().sequence for future in futures] == list(range(1, 2501))
        assert log.commits < 2500, "appends that wait together are committed together"
    with SandboxLog(ground / "log", readonly=True) as log:
        events = list(log.events("a"))
        assert [event.body.get("n") for event in events] == [None, *range(2500)]
        assert all(b.prev == a.digest for a, b in itertools.pairwise(events))
        assert log.verify().damage == []


def _edit(path: Path, database: str, change: object) -> None:
    env = lmdb.open(str(path), max_dbs=3)
    with env.begin(write=True) as txn:
        change(txn, env.open_db(database.encode(), txn=txn))  # type: ignore[operator]
    env.close()


def _flip(txn: lmdb.Transaction, db: object) -> None:
    key, raw = next(item for n, item in enumerate(txn.cursor(db)) if n == 2)
    changed = bytearray(raw)
    changed[-3] ^= 1
    txn.put(key, bytes(changed), db=db)


def _delete_last(txn: lmdb.Transaction, db: object) -> None:
    with txn.cursor(db) as cursor:
        cursor.last()
        cursor.delete()


def _swap(txn: lmdb.Transaction, db: object) -> None:
    items = list(txn.cursor(db))
    txn.put(items[1][0], items[2][1], db=db)
    txn.put(items[2][0], items[1][1], db=db)


@pytest.mark.parametrize("change", [_flip, _delete_last, _swap])
def test_a_changed_lost_or_swapped_event_is_found_and_nothing_is_answered(ground: Path, change: object) -> None:
    path = ground / "log"
    with SandboxLog(path) as log:
        writer = log.writer("a", HEADER)
        for n in range(5):
            writer.append(Kind.STATE, {"n": n}).result()
        log.writer("whole", HEADER)
    _edit(path, "events", change) if change is not _delete_last else _edit(path, "events", _delete_last_of_a)
    with SandboxLog(path) as log:
        with pytest.raises(LogDamaged, match=r"event \d|decoded"):
            list(log.events("a"))
        report = log.verify()
        assert len(report.damage) == 1
        assert report.sandboxes == 2
        assert len(list(log.events("whole"))) == 1


def _delete_last_of_a(txn: lmdb.Transaction, db: object) -> None:
    keys = [key for key, _ in txn.cursor(db) if key.startswith(bytes(8))]
    assert txn.delete(keys[-1], db=db)


def test_a_stale_writer_is_refused_at_commit_and_the_new_one_goes_on(log: SandboxLog) -> None:
    old = log.writer("a", HEADER)
    old.append(Kind.STATE, {"by": "old"}).result()
    new = log.writer("a", HEADER)
    with pytest.raises(LogFenced, match="epoch 1, the present one 2"):
        old.append(Kind.STATE, {"by": "old"}).result()
    with pytest.raises(LogFenced):
        old.check()
    new.check()
    new.append(Kind.STATE, {"by": "new"}).result()
    assert [(event.body.get("by"), event.epoch) for event in log.events("a")] == [(None, 1), ("old", 1), ("new", 2)]


def test_a_refused_append_does_not_harm_others_in_the_same_commit(log: SandboxLog) -> None:
    stale, other = log.writer("a", HEADER), log.writer("b", HEADER)
    log.writer("a", HEADER)
    futures = [writer.append(Kind.STATE, {"n": n}) for n in range(20) for writer in (stale, other)]
    assert all(isinstance(future.exception(), LogFenced) for future in futures[::2])
    assert [event.body.get("n") for event in log.events("b")] == [None, *range(20)]
    assert len(list(log.events("a"))) == 1


def test_being_overtaken_between_commit_and_acknowledgement_is_not_acknowledged(log: SandboxLog) -> None:
    writer = log.writer("a", HEADER)
    write = log._environment.write

    def write_then_be_overtaken(function: object) -> object:
        answer = write(function)  # type: ignore[arg-type]
        end = log.summary("a")
        taken = type(end)("a", end.number, end.epoch + 1, end.events, end.head)
        write(lambda txn: log._chains.put_end(txn, b"a", taken))
        return answer

    log._environment.write = write_then_be_overtaken  # type: ignore[method-assign, assignment]
    with pytest.raises(LogFenced):
        writer.append(Kind.STATE, {}).result()


def test_the_map_grows_while_readers_read(ground: Path) -> None:
    with SandboxLog(ground / "log", map_bytes=1 << 20) as log:
        writer = log.writer("a", HEADER)
        stop, failures = threading.Event(), []

        def read() -> None:
            while not stop.is_set():
                try:
                    list(log.events("a"))
                except Exception as error:
                    failures.append(error)

        threads = [threading.Thread(target=read) for _ in range(3)]
        for thread in threads:
            thread.start()
        for _ in range(60):
            writer.append(Kind.STATE, {"data": os.urandom(100_000)}).result(timeout=30)
        stop.set()
        for thread in threads:
            thread.join()
        assert failures == []
        assert len(list(log.events("a"))) == 61
        assert log._environment._env.info()["map_size"] > 6_000_000


_READER = """
    import sys, time
    from sandbox_log.log import SandboxLog
    with SandboxLog(sys.argv[1], readonly=True, map_bytes=1 << 20) as log:
        seen = 0
        while seen < int(sys.argv[2]):
            events = list(log.events("a"))
            assert len(events) >= seen, (len(events), seen)
            seen = len(events)
        print(seen)
"""


def test_many_reader_processes_follow_one_writer_over_growth(ground: Path) -> None:
    with SandboxLog(ground / "log", map_bytes=1 << 20) as log:
        writer = log.writer("a", HEADER)
        command = [sys.executable, "-c", textwrap.dedent(_READER), str(log.path), "301"]
        readers = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(4)]
        for _ in range(300):
            writer.append(Kind.STATE, {"data": bytes(10_000)}).result()
        for reader in readers:
            out, _ = reader.communicate(timeout=60)
            assert reader.returncode == 0
            assert out.strip() == "301"


_GROW = """
    import sys
    from sandbox_log.events import Kind
    from sandbox_log.log import SandboxLog
    with SandboxLog(sys.argv[1], map_bytes=1 << 20) as log:
        log.writer("a", {"instance": "i"}).append(Kind.STATE, {"data": bytes(int(sys.argv[2]))}).result()
"""


def test_a_log_that_grows_while_it_is_opened_is_opened(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_GROW), str(ground / "log")]
    subprocess.run([*command, "10"], check=True)
    real = lmdb.open

    def opened(*args: Any, **options: Any) -> Any:
        environment = real(*args, **options)
        subprocess.run([*command, str(4 << 20)], check=True)
        return environment

    monkeypatch.setattr(lmdb, "open", opened)
    with SandboxLog(ground / "log", readonly=True, map_bytes=1 << 20) as log:
        assert [e.kind for e in log.events("a")].count(Kind.STATE) == 2


def test_another_process_that_takes_over_fences_this_one(ground: Path) -> None:
    with SandboxLog(ground / "log") as log:
        writer = log.writer("a", HEADER)
        code = (
            "import sys; from sandbox_log.log import SandboxLog\nwith SandboxLog(sys.argv[1]) as l: l.writer('a', {})"
        )
        subprocess.run([sys.executable, "-c", code, str(log.path)], check=True)
        with pytest.raises(LogFenced):
            writer.append(Kind.STATE, {}).result()


def test_an_error_of_the_disk_poisons_for_good_and_everybody_hears_of_it(ground: Path) -> None:
    calls = 0

    def fail(point: str) -> None:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise OSError(5, "Input/output error")

    with SandboxLog(ground / "log", faults=fail) as log:
        a, b = log.writer("a", HEADER), log.writer("b", HEADER)
        a.append(Kind.INTENT, {"n": 0}).result()
        waiting = [writer.append(Kind.INTENT, {"n": 1}) for writer in (a, b)]
        for future in waiting:
            with pytest.raises(LogPoisoned, match="Input/output error"):
                future.result()
        with pytest.raises(LogPoisoned):
            b.append(Kind.OUTCOME, {}).result()
        with pytest.raises(LogPoisoned):
            log.writer("c", HEADER)
        assert len(list(log.events("a"))) == 2, "what was acknowledged can still be read"
    with SandboxLog(ground / "log") as log:
        assert log.verify().damage == []
        assert len(list(log.events("a"))) == 2


_FULL = """
    import resource, signal, sys
    from sandbox_log.errors import LogPoisoned
    from sandbox_log.events import Kind
    from sandbox_log.log import SandboxLog
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    log = SandboxLog(sys.argv[1])
    writer = log.writer("a", {"instance": "i"})
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    done = 0
    try:
        while True:
            writer.append(Kind.STATE, {"n": done, "data": bytes(50_000)}).result(timeout=30)
            done += 1
    except LogPoisoned as error:
        print(done)
        try:
            writer.append(Kind.STATE, {}).result()
        except LogPoisoned:
            print("poisoned")
"""


def test_a_file_that_cannot_grow_really_poisons_and_loses_nothing_acknowledged(ground: Path) -> None:
    command = [sys.executable, "-c", textwrap.dedent(_FULL), str(ground / "log")]
    out = subprocess.run(command, capture_output=True, text=True, check=True, timeout=60).stdout.split()
    assert out[1] == "poisoned"
    with SandboxLog(ground / "log") as log:
        events = list(log.events("a"))
        assert len(events) in (int(out[0]) + 1, int(out[0]) + 2)  # the last may be there unacknowledged
        log.writer("a", HEADER).append(Kind.STATE, {"after": True}).result()
        assert log.verify().damage == []


def test_a_fork_must_not_use_it(ground: Path) -> None:
    code = """
        import os, sys
        from sandbox_log.errors import LogInUse
        from sandbox_log.log import SandboxLog
        log = SandboxLog(sys.argv[1])
        log.writer("a", {"instance": "i"})
        child = os.fork()
        if child == 0:
            try:
                log.summary("a")
            except LogInUse:
                os._exit(7)
            os._exit(1)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
        log.summary("a")
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(ground / "log")], check=True, timeout=60)


def test_opening_twice_in_one_process_is_refused(log: SandboxLog) -> None:
    with pytest.raises(LogInUse, match="already open"):
        SandboxLog(log.path)


def test_what_is_no_log_or_too_new_or_not_there_is_named(ground: Path) -> None:
    with pytest.raises(SandboxLogError, match="no sandbox log"):
        SandboxLog(ground / "none", readonly=True)
    (ground / "junk").mkdir()
    (ground / "junk" / "data.mdb").write_bytes(b"no database" * 1000)
    with pytest.raises(LogDamaged, match="cannot be opened"):
        SandboxLog(ground / "junk")
    with SandboxLog(ground / "new") as log, pytest.raises(UnknownSandbox, match="no sandbox 'x'"):
        list(log.events("x"))
    _edit(ground / "new", "meta", lambda txn, db: txn.put(b"format", b"99", db=db))
    with pytest.raises(LogTooNew, match="format 99"):
        SandboxLog(ground / "new")


@pytest.mark.parametrize("name", ["", "x" * 401, "\ud800"])
def test_sandbox_ids_that_cannot_be_keys_are_refused(log: SandboxLog, name: str) -> None:
    with pytest.raises(BadCall, match="400 bytes"):
        log.writer(name, HEADER)


_MOUNTS = """\
22 1 8:1 / / rw - ext4 /dev/sda1 rw
30 22 0:5 / /home rw shared:1 - nfs4 server:/home rw
31 30 8:2 / /home/me/local rw - xfs /dev/sdb1 rw
32 22 0:9 / /with\\040spaceä rw - fuse.sshfs host: rw
33 22 0:7 / /over rw - nfs a:/ rw
34 22 0:8 / /over rw - tmpfs none rw
"""


@pytest.mark.parametrize(
    ("path", "kind"),
    [
        ("/var/log", "ext4"),
        ("/home/me/log", "nfs4"),
        ("/home/me/local/log", "xfs"),
        ("/homework", "ext4"),
        ("/with spaceä/log", "fuse.sshfs"),
        ("/over/log", "tmpfs"),
    ],
)
def test_the_file_system_of_a_path_is_that_of_its_innermost_mount(path: str, kind: str) -> None:
    assert file_system_of(Path(path), _MOUNTS) == kind


def test_a_network_file_system_is_refused_unless_told(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sandbox_log.environment.file_system_of", lambda path, mounts: "nfs4")
    with pytest.raises(NetworkFileSystem, match="nfs4"):
        SandboxLog(ground / "log")
    SandboxLog(ground / "log", allow_network=True).close()


def test_large_payloads_become_blobs_once_and_come_back(log: SandboxLog) -> None:
    data = os.urandom(100_000)
    ref = log.store(data)
    assert isinstance(ref, BlobRef)
    assert log.store(data) == ref
    assert log.load(ref) == data
    assert log.store(b"small") == b"small"
    assert len(list(log.blobs.digests())) == 1


def test_a_blob_that_cannot_be_written_poisons_the_log_and_no_sync_is_asked_again(
    log: SandboxLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    writer = log.writer("a", HEADER)
    data, asked = os.urandom(100_000), []
    slow = threading.Event()

    def fail_once(path: Path) -> None:
        if len(path.name) == 2:  # a shard: the blob is there already, under a name that may not last
            asked.append(path)
            if len(asked) == 1:
                slow.set()
                time.sleep(0.2)
                raise OSError(5, "Input/output error")

    def put() -> None:
        with pytest.raises(LogPoisoned, match="Input/output error"):
            log.store(data)

    monkeypatch.setattr("sandbox_log.blobs.sync_directory", fail_once)
    with ThreadPoolExecutor() as pool:
        first = pool.submit(put)
        slow.wait(10)
        at_the_same_time = pool.submit(put)
        first.result()
        at_the_same_time.result()
    put()
    assert len(asked) == 1
    with pytest.raises(LogPoisoned):
        writer.append(Kind.STATE, {}).result()


@pytest.mark.parametrize("number", [errno.EMFILE, errno.ENFILE, errno.ENOMEM])
def test_what_cannot_become_a_blob_for_want_of_a_descriptor_stands_in_the_event(
    log: SandboxLog, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    writer = log.writer("a", HEADER)
    data = os.urandom(100_000)
    with monkeypatch.context() as patch:
        patch.setattr("sandbox_log.blobs.open", refuse, raising=False)
        assert log.store(data) == data
        if number != errno.ENOMEM:
            patch.setattr("sandbox_log.blobs.sync_directory", refuse)
            assert log.store(data) == data
    writer.append(Kind.STATE, {"data": data}).result()
    assert list(log.events("a"))[-1].body["data"] == data
    assert isinstance(log.store(data), BlobRef), "the log goes on, and so do its blobs"
    assert log.verify().damage == []


def test_a_process_that_has_no_descriptor_left_loses_no_output(ground: Path) -> None:
    code = """
        import asyncio, errno, os, sys
        from sandbox_log.backends.functions import FunctionSandbox
        from sandbox_log.log import SandboxLog
        from sandbox_log.replay import LoggedSandbox
        from sandbox_log.sandbox import Call, Operation

        taken = []

        def greedy():
            try:
                while True:
                    taken.append(os.open("/dev/null", os.O_RDONLY))
            except OSError as error:
                assert error.errno == errno.EMFILE
            return "x" * 100_000

        async def main():
            log = SandboxLog(sys.argv[1])
            logged = await LoggedSandbox.open(log, "a", FunctionSandbox({"greedy": greedy}))
            result = await logged.run(Call(Operation.CALL, {"name": "greedy"}))
            assert len(result.stdout) == 100_000, result
            while taken:
                os.close(taken.pop())
            log.close()

        asyncio.run(main())
    """
    subprocess.run([sys.executable, "-c", textwrap.dedent(code), str(ground / "log")], check=True, timeout=60)
    with SandboxLog(ground / "log") as log:
        assert log.verify().damage == []
        assert list(log.events("a"))[-1].body["stdout"] == b"x" * 100_000


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.ENOMEM])
def test_any_other_error_of_a_blob_poisons_the_log(
    log: SandboxLog, number: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(fd: int) -> None:
        raise OSError(number, os.strerror(number))

    log.writer("a", HEADER)
    log.store(os.urandom(100_000))
    monkeypatch.setattr(os, "fsync", refuse)
    for _ in range(2):
        with pytest.raises(LogPoisoned, match=os.strerror(number)):
            log.store(os.urandom(100_000))


def test_a_directory_that_somebody_else_made_is_made_durable_too(ground: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: set[Path] = set()

    def note(path: Path) -> None:
        synced.add(path)

    monkeypatch.setattr("sandbox_log.directories.sync_directory", note)
    monkeypatch.setattr("sandbox_log.blobs.sync_directory", note)
    (ground / "job" / "log" / "blobs" / "tmp").mkdir(parents=True)  # and died
    with SandboxLog(ground / "job" / "log") as log:
        assert {ground, ground / "job", log.path, log.path / "blobs"} <= synced


def test_a_blob_that_is_not_what_was_written_is_damage(log: SandboxLog) -> None:
    ref = log.blobs.put(b"".join(b"%d" % n for n in range(10_000)))
    longer = log.blobs.put(b"a" * 50_001)
    path = next(path for digest, path in log.blobs.digests() if digest == ref.digest)
    other = next(path for digest, path in log.blobs.digests() if digest == longer.digest)
    good = path.read_bytes()
    for bad in (b"", good[:20], good[:30] + b"x" + good[31:], other.read_bytes(), b"junk" * 10):
        path.write_bytes(bad)
        with pytest.raises(LogDamaged, match="blob"):
            log.blobs.get(ref)
    path.unlink()
    with pytest.raises(LogDamaged, match="missing"):
        log.blobs.get(ref)


def test_a_decompression_bomb_is_stopped_at_the_size_that_the_log_claims(log: SandboxLog) -> None:
    bomb = log.blobs.put(bytes(200 << 20))
    claimed = BlobRef(bomb.digest, 1000)
    with pytest.raises(LogDamaged, match="more than 1000"):
        log.blobs.get(claimed)
    with pytest.raises(LogDamaged, match="claimed"):
        log.blobs.get(BlobRef(bomb.digest, 1 << 40))


def test_orphans_are_collected_and_referred_blobs_stay(ground: Path) -> None:
    path = ground / "log"
    with SandboxLog(path) as log:
        writer = log.writer("a", HEADER)
        kept = log.store(b"k" * 50_000)
        assert isinstance(kept, BlobRef)
        writer.append(Kind.STATE, {"deep": [{"x": kept.to_map()}]}).result()
        assert blob_refs({"deep": [{"x": kept.to_map()}]}) == [kept]
        log.store(b"o" * 50_000)
        (path / "blobs" / "tmp" / "half").write_bytes(b"half written")
        assert log.verify().orphans == 1
        with pytest.raises(LogInUse, match="already open"):
            SandboxLog.collect(path)
        code = "import sys; from sandbox_log.log import SandboxLog; SandboxLog.collect(sys.argv[1])"
        other = subprocess.run([sys.executable, "-c", code, str(path)], capture_output=True, text=True, check=False)
        assert "LogInUse" in other.stderr
        assert "open for writing" in other.stderr
    assert SandboxLog.collect(path)[0] == 2
    with SandboxLog(path) as log:
        assert log.verify().damage == []
        assert log.verify().orphans == 0
        assert log.load(kept) == b"k" * 50_000


def test_a_thousand_writers_share_commits(log: SandboxLog) -> None:
    async def main() -> None:
        writers = [log.writer(f"s{n}", HEADER) for n in range(1000)]
        before = log.commits
        for _ in range(3):
            await asyncio.gather(*(asyncio.wrap_future(writer.append(Kind.STATE, {})) for writer in writers))
        assert log.commits - before < 2000, "of 3000 appends"

    asyncio.run(main())
    assert all(end.events == 4 for end in log.sandboxes())
