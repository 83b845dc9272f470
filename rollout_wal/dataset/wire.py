"""Messages between a node's reader and its ranks: msgpack in SOCK_SEQPACKET, so that each arrives whole.

The socket is in Linux's abstract namespace: it has no file that a killed process could leave behind. Peers of another
user are refused. Payload never travels here; it is mapped.
"""

from __future__ import annotations

import array
import hashlib
import os
import socket
import struct
from typing import Any

import msgpack

from .errors import LoaderError, problem

PROTOCOL = 1
MESSAGE_BYTES_MAX = 1 << 16
#: Size of sun_path in Linux's sockaddr_un.
_ADDRESS_BYTES_MAX = 108


def abstract_address(name: str) -> str:
    """The socket address of a reader, by the name that all ranks of a node agreed on."""
    address = f"\0rollout-wal/{os.getuid()}/{name}"
    if len(os.fsencode(address)) > _ADDRESS_BYTES_MAX:  # names are often made from paths; all ranks get the same digest
        digest = hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest()
        address = f"\0rollout-wal/{os.getuid()}/long/{digest}"
    return address


def connect(name: str) -> socket.socket | None:
    """Connect to a reader; None if there is none."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.connect(abstract_address(name))
    except (ConnectionRefusedError, FileNotFoundError):
        sock.close()
        return None
    except BaseException:
        sock.close()
        raise
    return sock


def listen(name: str) -> socket.socket | None:
    """Bind the name; None if another reader has it. Binding is what decides between readers that start at once."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET | socket.SOCK_CLOEXEC)
    try:
        sock.bind(abstract_address(name))
        sock.listen(128)
    except OSError:
        sock.close()
        return None
    return sock


def same_user(sock: socket.socket) -> bool:
    """Whether the peer runs as the same user."""
    raw = sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    _, uid, _ = struct.unpack("3i", raw)
    return bool(uid == os.getuid())


def send(sock: socket.socket, message: dict[str, Any], fd: int | None = None) -> None:
    """Send one message, and a file descriptor with it."""
    raw = msgpack.packb(message)
    if len(raw) > MESSAGE_BYTES_MAX:
        raise LoaderError(
            problem(
                f"a message of {len(raw)} bytes is above the limit of {MESSAGE_BYTES_MAX}",
                consequence="It was not sent",
                remedy="Report this: messages carry no payload and should be small",
            )
        )
    ancillary = [] if fd is None else [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))]
    sock.sendmsg([raw], ancillary)


def receive(sock: socket.socket) -> tuple[dict[str, Any], int | None] | None:
    """One message and the file descriptor that came with it; None if the peer is gone.

    Raises:
        LoaderError: what arrived is not a message of ours.
    """
    try:
        raw, ancillary, flags, _ = sock.recvmsg(
            MESSAGE_BYTES_MAX, socket.CMSG_LEN(array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
        )
    except ConnectionResetError:
        return None
    fd = None
    for level, kind, data in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            fd = struct.unpack("i", data[:4])[0]
    if not raw:
        return None
    try:
        message = msgpack.unpackb(raw)
        if flags & socket.MSG_TRUNC or not isinstance(message, dict) or not isinstance(message.get("kind"), str):
            raise ValueError("not a map with a kind, or cut short")
    except ValueError as error:
        if fd is not None:
            os.close(fd)
        raise LoaderError(
            problem(
                f"a message that is not of the loader's protocol arrived: {error}",
                consequence="The connection cannot be used any more",
                remedy="See that nothing else uses the same loader name, and that all ranks run the same version",
            )
        ) from error
    return message, fd
