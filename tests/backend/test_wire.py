"""Messages between a backend and its workers, whatever their size."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from rollout_wal.backend import RolloutBackend
from rollout_wal.backend.wire import Channel, receive_with_fds, send_with_fds
from rollout_wal.errors import BackendError
from rollout_wal.params import SamplingParams


@pytest.fixture
def packets() -> Iterator[tuple[socket.socket, socket.socket]]:
    a, b = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with a, b:
        yield a, b


def test_what_does_not_fit_a_packet_is_refused_and_not_sent(packets: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = packets
    for size in (1 << 16, 1 << 20):
        with pytest.raises(BackendError, match="at most 65536"):
            send_with_fds(sender, {"x": bytes(size)}, [sender.fileno()])
    send_with_fds(sender, {"x": bytes(65000)}, [sender.fileno()])
    message, fds = receive_with_fds(receiver)
    assert message == {"x": bytes(65000)}
    for fd in fds:
        os.close(fd)
    assert len(fds) == 1


def test_a_packet_that_was_cut_is_refused(packets: tuple[socket.socket, socket.socket]) -> None:
    sender, receiver = packets
    sender.send(bytes(1 << 17))
    with pytest.raises(BackendError, match="was cut"):
        receive_with_fds(receiver)
    before = len(os.listdir("/proc/self/fd"))
    send_with_fds(sender, {}, [sender.fileno()] * 20)
    with pytest.raises(BackendError, match="was cut"):
        receive_with_fds(receiver)
    assert len(os.listdir("/proc/self/fd")) == before


def test_one_message_is_taken_and_the_others_stay() -> None:
    a, b = socket.socketpair()
    ours, theirs = Channel(a), Channel(b)
    assert theirs.receive_one(0.0) is None
    for number in range(3):
        ours.send({"number": number})
    assert theirs.receive_one(1.0) == {"number": 0}
    assert [m["number"] for m in theirs.receive()] == [1, 2]
    ours.send({"long": bytes(1 << 20)})  # more than the socket holds
    assert theirs.receive_one(0.0) is None
    assert ours.wants_write
    while ours.wants_write:
        ours.flush()
        message = theirs.receive_one(0.0)
    assert message is not None
    assert len(message["long"]) == 1 << 20
    ours.close()
    assert theirs.receive_one(1.0) is None
    assert theirs.closed
    theirs.close()


def test_a_worker_starts_whatever_is_in_flight(
    backend: Callable[..., RolloutBackend],
    prompts: Any,
    until: Callable[..., None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With KV snapshots each worker hears of all of it: its store drops the snapshots of what is over."""
    with backend(workers=1, kv="auto") as b:
        many = [SimpleNamespace(id=number) for number in range(100_000, 200_000)]
        monkeypatch.setattr(b._running().wal, "in_flight", lambda: many)
        b.kill_worker("0")
        until(lambda: b.worker_steps().get("0", (0, 0))[0] == 2, 60.0)
        assert len(list(b.generate(prompts, SamplingParams(max_tokens=5), group_size=2))) == 16
        assert b.stats.deaths == 1
