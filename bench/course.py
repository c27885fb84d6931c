"""The bytes of a long stream, so made that whatever is lost, doubled, changed or out of order shows at once. No I/O.

A stream is frames: a head (length, number, running CRC-32 of all payload so far) and random payload. The last frame
says what its side has sent and received, so that both sides know of every byte what became of it.
"""

from __future__ import annotations

import random
import struct
import zlib

HEAD = struct.Struct("!III")
LAST = struct.Struct("!QQ")  # sent, received
END = 0xFFFFFFFF  # the length in the head of the last frame
LARGEST = 1 << 16  # no payload is larger: a head that says so is none


class Wrong(Exception):
    """What came is not what was sent."""


class Outgoing:
    """One direction, where it is sent. The seed is that of the payload."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(seed)
        self._number = self._crc = 0
        self.sent = 0  # bytes of payload

    def frame(self, size: int) -> bytes:
        payload = self._dice.randbytes(size)
        self._crc = zlib.crc32(payload, self._crc)
        made = HEAD.pack(size, self._number, self._crc) + payload
        self._number += 1
        self.sent += size
        return made

    def last(self, received: int) -> bytes:
        return HEAD.pack(END, self._number, self._crc) + LAST.pack(self.sent, received)


class Incoming:
    """The same direction, where it is received."""

    def __init__(self) -> None:
        self._number = self._crc = 0
        self.received = 0
        self.told: tuple[int, int] | None = None  # what the last frame said: sent, received

    def rest(self, head: bytes) -> int:
        """How many bytes come behind this head. Raises Wrong."""
        length, number, _crc = HEAD.unpack(head)
        if number != self._number:
            raise Wrong(f"frame {number} where {self._number} was due")
        if length == END:
            return LAST.size
        if length > LARGEST:
            raise Wrong(f"a frame of {length} bytes")
        return int(length)

    def take(self, head: bytes, body: bytes) -> None:
        """A whole frame. Raises Wrong."""
        length, _number, crc = HEAD.unpack(head)
        ours = self._crc if length == END else zlib.crc32(body, self._crc)
        if crc != ours:
            raise Wrong(f"the checksum differs after {self.received} bytes")
        self._number += 1
        if length == END:
            sent, received = LAST.unpack(body)
            self.told = sent, received
            if sent != self.received:
                raise Wrong(f"{sent} bytes were sent and {self.received} came")
        else:
            self._crc = crc
            self.received += len(body)

    def again(self, head: bytes) -> bool:
        """Is this the head of the frame that was taken last? Then its sender did not hear of it."""
        _length, number, crc = HEAD.unpack(head)
        return bool(number + 1 == self._number and crc == self._crc)
