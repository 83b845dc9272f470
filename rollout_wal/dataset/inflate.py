"""Decompress an Arrow record batch message into place, with zstandard itself.

Arrow sets up a new zstd context for each of a batch's dozens of small buffers, which for samples of some thousand
tokens costs ten times the decompression. So the message is unpacked here: each buffer is decompressed to where it
belongs, and the message's own head is copied with the new offsets written over the old ones and its mention of
compression erased.

Layout (Arrow's columnar format, "encapsulated message"; little-endian): 0xFFFFFFFF, int32 length of the head, the head
(a flatbuffer `Message` holding a `RecordBatch`), the body. A compressed buffer begins with its int64 length
uncompressed, or -1 if it was left as it is.
"""

from __future__ import annotations

import struct

import zstandard

#: What an inflated message may exceed Arrow's own uncompressed one by: the head's mention of compression.
HEAD_SLACK_BYTES = 64

_PREFIX_BYTES = 8
_ALIGN = 8
#: The length that stands before each compressed buffer.
_RAW_BYTES = 8
#: Up to here a copy costs less than setting up a stream.
_SMALL_BYTES = 64 * 1024
#: How a frame begins that holds so many bytes in one stored block (RFC 8878): magic, "one segment, size in a byte", the
#: size, and a block that is the last, stored, and of that size. Most buffers are an offset or two: they look like this,
#: and a call into zstd for each would take as long as all of the decompression.
_STORED = [b"\x28\xb5\x2f\xfd\x20" + bytes([size]) + (size << 3 | 1).to_bytes(3, "little") for size in range(256)]
_STORED_BYTES = 9
# Fields of the flatbuffer tables, by their number in Arrow's Message.fbs.
_MESSAGE_HEADER, _MESSAGE_BODY_LENGTH = 2, 3
_BATCH_BUFFERS, _BATCH_COMPRESSION = 2, 3
_int64 = struct.Struct("<q")
_uint32 = struct.Struct("<I")
_uint16 = struct.Struct("<H")


def inflate(message: bytearray | memoryview, into: memoryview, decompressor: zstandard.ZstdDecompressor) -> None:
    """Write the uncompressed message to the beginning of `into`.

    Args:
        message: a record batch message whose buffers are compressed by zstd. Its head is changed.
        into: bytes, at least the uncompressed message's and `HEAD_SLACK_BYTES`.
        decompressor: kept by the caller, for its context.

    Raises:
        ValueError: not such a message, or `into` is too small.
        zstandard.ZstdError: damaged.
    """
    try:
        _inflate(memoryview(message), into, decompressor)
    except struct.error as error:
        raise ValueError(f"not a compressed record batch: {error}") from error


def _inflate(message: memoryview, into: memoryview, decompressor: zstandard.ZstdDecompressor) -> None:
    head_bytes = _uint32.unpack_from(message, 4)[0]
    body = _PREFIX_BYTES + head_bytes
    table = _PREFIX_BYTES + _uint32.unpack_from(message, _PREFIX_BYTES)[0]
    header = _field(message, table, _MESSAGE_HEADER)
    body_length = _field(message, table, _MESSAGE_BODY_LENGTH)
    batch = header + _uint32.unpack_from(message, header)[0]
    buffers = _field(message, batch, _BATCH_BUFFERS)
    if not (header and body_length and buffers):
        raise ValueError("not a record batch with buffers")
    if not _field(message, batch, _BATCH_COMPRESSION):
        raise ValueError("not compressed")
    buffers += _uint32.unpack_from(message, buffers)[0]
    count = _uint32.unpack_from(message, buffers)[0]
    if count * 16 > head_bytes:
        raise ValueError(f"{count} buffers do not fit into a head of {head_bytes} bytes")
    # Offset and size of each buffer, one after the other: there and, as they are replaced, here.
    entries = struct.Struct(f"<{2 * count}q")
    extents = list(entries.unpack_from(message, buffers + 4))
    stop = len(message)
    room = len(into)
    at = body
    for number in range(0, 2 * count, 2):
        size = extents[number + 1]
        if size:
            start = body + extents[number]
            raw = _int64.unpack_from(message, start)[0]
            as_it_is = raw == -1
            if as_it_is:
                raw = size - _RAW_BYTES
            if size < _RAW_BYTES or start + size > stop or raw < 0 or at + raw > room:
                raise ValueError("a buffer reaches beyond its end")
            packed = message[start + _RAW_BYTES : start + size]
            if as_it_is:
                into[at : at + raw] = packed
            elif raw < len(_STORED) and packed[:_STORED_BYTES] == _STORED[raw] and len(packed) == raw + _STORED_BYTES:
                into[at : at + raw] = packed[_STORED_BYTES:]
            elif raw > _SMALL_BYTES:
                _stream(packed, into[at : at + raw], decompressor)
            else:
                _decompress(packed, into[at : at + raw], decompressor)
            size = raw
        extents[number] = at - body
        extents[number + 1] = size
        at += -(-size // _ALIGN) * _ALIGN
    entries.pack_into(message, buffers + 4, *extents)
    _int64.pack_into(message, body_length, at - body)
    _uint16.pack_into(message, _slot(message, batch, _BATCH_COMPRESSION), 0)
    into[:body] = message[:body]


def _decompress(packed: memoryview, target: memoryview, decompressor: zstandard.ZstdDecompressor) -> None:
    """A small frame: zstandard allocates what it returns."""
    # What it allocates is what the frame says of itself.
    if zstandard.frame_content_size(packed) != len(target):
        raise ValueError(f"a frame holds another number of bytes than the {len(target)} that are stated")
    target[:] = decompressor.decompress(packed)


def _stream(packed: memoryview, target: memoryview, decompressor: zstandard.ZstdDecompressor) -> None:
    """A frame straight into place. With all of it at hand and room for all of it, zstd needs no buffer of its own."""
    with decompressor.stream_reader(packed) as reader:
        done = 0
        while done < len(target):
            count = reader.readinto(target[done:])
            if count == 0:
                raise ValueError(f"a buffer ends after {done} of {len(target)} bytes")
            done += count


def _slot(message: memoryview, table: int, field: int) -> int:
    """Where a table's vtable keeps the offset of a field; 0 if the vtable is too short to have one."""
    vtable = table - struct.unpack_from("<i", message, table)[0]
    slot = 4 + 2 * field
    return int(vtable + slot) if slot < _uint16.unpack_from(message, vtable)[0] else 0


def _field(message: memoryview, table: int, field: int) -> int:
    """Where a field of a table is; 0 if it is not there."""
    slot = _slot(message, table, field)
    offset = _uint16.unpack_from(message, slot)[0] if slot else 0
    return table + int(offset) if offset else 0
