"""Messages between the processes of one backend: msgpack over a Unix socket, each behind its length. No pickle."""

from __future__ import annotations

import array
import os
import select
import socket
import struct
from collections import deque
from typing import Any, Final

import msgpack

from ..errors import BackendError, problem

_LENGTH: Final = struct.Struct("<I")
_MAX_MESSAGE: Final = 1 << 30
_CHUNK: Final = 1 << 20
_MAX_PACKET: Final = 1 << 16
"""With open files a message is one packet, which is received whole or not at all."""

Message = dict[str, Any]


def wait_for(fd: int, events: int, timeout_s: float | None) -> int:
    """Which of `events` (select.POLLIN, POLLOUT) have happened on a descriptor; waits that long (None: for ever).

    `select.select` would fail for descriptors above 1023, of which a trainer may have many.
    """
    poll = select.poll()
    poll.register(fd, events)
    ready = poll.poll(None if timeout_s is None else timeout_s * 1e3)
    return ready[0][1] if ready else 0


class Channel:
    """One end of a socket. Sending never blocks: what the peer does not take yet is kept here.

    It must not block, or two processes that both send before they read would wait for each other for ever.
    """

    def __init__(self, sock: socket.socket) -> None:
        sock.setblocking(False)
        self.sock = sock
        self._out: deque[memoryview] = deque()
        self._in = bytearray()
        self.closed = False
        """The peer is gone. What it had sent before can still be received."""

    def fileno(self) -> int:
        return self.sock.fileno()

    @property
    def wants_write(self) -> bool:
        return bool(self._out)

    def send(self, message: Message) -> None:
        """Queue a message and send what the socket takes. A peer that is gone is noticed by the receiver."""
        body = msgpack.packb(message)
        self._out.append(memoryview(_LENGTH.pack(len(body)) + body))
        self.flush()

    def flush(self) -> None:
        """Send what the socket takes now."""
        while self._out and not self.closed:
            try:
                n = self.sock.send(self._out[0])
            except BlockingIOError:
                return
            except (BrokenPipeError, ConnectionResetError):
                self.closed = True
                return
            if n == len(self._out[0]):
                self._out.popleft()
            else:
                self._out[0] = self._out[0][n:]

    def drain(self, timeout_s: float) -> bool:
        """Block until everything is sent. False: the peer is gone, or did not take it in time."""
        while self._out and not self.closed:
            if not wait_for(self.sock.fileno(), select.POLLOUT, timeout_s):
                return False
            self.flush()
        return not self._out

    def receive(self, timeout_s: float | None = 0.0) -> list[Message]:
        """The complete messages that have arrived; waits up to `timeout_s` for the first (None: for ever).

        Raises:
            BackendError: a message larger than any of ours.
        """
        messages = self._parse()
        self._read(0.0 if messages else timeout_s)
        return messages + self._parse()

    def receive_one(self, timeout_s: float | None) -> Message | None:
        """The next message alone; those behind it stay for `receive`. None: it is not there in time."""
        if not (messages := self._parse(1)):
            self._read(timeout_s)
            messages = self._parse(1)
        return messages[0] if messages else None

    def _read(self, timeout_s: float | None) -> None:
        """Take in what has arrived; wait up to `timeout_s` for the first of it."""
        if timeout_s != 0.0 and not self.closed:
            events = select.POLLIN | (select.POLLOUT if self._out else 0)
            if wait_for(self.sock.fileno(), events, timeout_s) & select.POLLOUT:
                self.flush()
        while not self.closed:
            try:
                data = self.sock.recv(_CHUNK)
            except BlockingIOError:
                break
            except ConnectionResetError:
                data = b""
            if not data:
                self.closed = True
                break
            self._in += data

    def _parse(self, most: int | None = None) -> list[Message]:
        """The complete messages, or the first few of them."""
        out: list[Message] = []
        at = 0
        while len(out) != most and len(self._in) - at >= _LENGTH.size:
            (length,) = _LENGTH.unpack_from(self._in, at)
            if length > _MAX_MESSAGE:
                raise BackendError(
                    problem(
                        f"a message of {length} bytes arrived on an internal socket",
                        consequence="The stream cannot be trusted any more",
                        remedy="Report this: no message is that large",
                    )
                )
            if len(self._in) - at - _LENGTH.size < length:
                break
            start = at + _LENGTH.size
            out.append(msgpack.unpackb(memoryview(self._in)[start : start + length], strict_map_key=False))
            at = start + length
        if at:
            del self._in[:at]
        return out

    def close(self) -> None:
        self.closed = True
        self.sock.close()


def send_with_fds(sock: socket.socket, message: Message, fds: list[int]) -> None:
    """One message that carries open files, on a blocking SOCK_SEQPACKET socket.

    Raises:
        BackendError: it is too long; nothing was sent. What may grow belongs into a `Channel`.
    """
    body = msgpack.packb(message)
    if len(body) > _MAX_PACKET:
        raise BackendError(
            problem(
                f"a worker's configuration takes {len(body)} bytes, and at most {_MAX_PACKET} can be handed to it",
                consequence="The worker was not started",
                remedy="Give the engine's large options as a file that it reads",
            )
        )
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([body], rights)


def receive_with_fds(sock: socket.socket) -> tuple[Message | None, list[int]]:
    """(message, open files); None when the peer is gone.

    Raises:
        BackendError: the message, or a file of it, did not arrive whole.
    """
    data, ancillary, flags, _ = sock.recvmsg(_MAX_PACKET, socket.CMSG_SPACE(8 * 4), socket.MSG_CMSG_CLOEXEC)
    fds = array.array("i")
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fds.frombytes(payload[: len(payload) - len(payload) % fds.itemsize])
    cut = bool(flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC))
    if cut or not data:
        for fd in fds:
            os.close(fd)
    if cut:
        raise BackendError(
            problem(
                "a message on an internal socket was cut",
                consequence="What it asked for is unknown, and was not done",
                remedy="Raise the limit of open files (ulimit -n), if it is reached; otherwise report this",
            )
        )
    if not data:
        return None, []
    return msgpack.unpackb(data, strict_map_key=False), list(fds)
