"""Bodies. Chunked ones are taken apart by llhttp and written anew: no byte of the sender's framing goes on. Pure."""

from __future__ import annotations

import re

import httptools

from userspace_proxy.grammar import CHUNKED
from userspace_proxy.limits import DEFAULT_LIMITS

LAST = b"0\r\n\r\n"
_END = b"\r\n\r\n"
_HEAD = b"POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n"
_VALUE = re.compile(rb"[\t\x20-\x7e\x80-\xff]*+")
# RFC 9110 6.5.1: fields that would change framing, routing or who is asking are no trailers.
_NO_TRAILERS = frozenset(
    b"authorization connection content-encoding content-length content-range content-type cookie expect host"
    b" keep-alive proxy-connection set-cookie te trailer transfer-encoding upgrade x-request-id".split()
)
SLACK = 64 * 1024  # bytes of chunk framing and trailers that are borne however small the body is
TRAILERS = 16 * 1024  # bytes of trailers, and of framing without a byte of body in between
RATIO = 8  # … and per byte of body: one byte per chunk is slow but legal


def encode(payload: bytes) -> bytes:
    """One chunk."""
    return b"%x\r\n%b\r\n" % (len(payload), payload) if payload else b""


def last(trailers: bytes) -> bytes:
    """The end of a chunked body."""
    return b"0\r\n%b\r\n" % trailers if trailers else LAST


class Dechunker:
    """Feed bytes, read `payload`, `done`, `trailers`; `feed` says how many bytes belonged to this body, -1: refused."""

    __slots__ = (
        "_body", "_fields", "_lines", "_parser", "_pieces", "_seen", "_since", "_started", "_tail", "_trailing", "done",
        "trailers",
    )  # fmt: skip

    def __init__(self, fields: int = DEFAULT_LIMITS.fields) -> None:
        self._fields = fields  # trailers that there may yet be
        self._lines: list[bytes] = []
        self._trailing = 0  # bytes of trailers
        self._since = 0  # bytes read since the last byte of body: behind the last chunk nothing resets it
        self._pieces: list[bytes] = []
        self._tail = b""
        self._seen = 0
        self._body = 0
        self._started = False
        self.done = False
        self.trailers = b""
        self._parser = httptools.HttpRequestParser(self)
        self._parser.feed_data(_HEAD)
        self._started = True

    def on_header(self, name: bytes, value: bytes) -> None:
        if not self._started:
            return
        self._fields -= 1
        self._trailing += len(name) + len(value) + 4
        if self._fields < 0 or self._trailing > TRAILERS:
            raise ValueError
        lower = name.lower()
        if lower in _NO_TRAILERS or lower.startswith(b"x-meshbpf-"):
            return
        if not _VALUE.fullmatch(value):
            raise ValueError
        self._lines.append(b"%b: %b\r\n" % (name, value))

    def on_body(self, piece: bytes) -> None:
        self._pieces.append(piece)
        self._body += len(piece)

    def on_message_complete(self) -> None:
        self.trailers = b"".join(self._lines)
        self.done = True

    def payload(self) -> bytes:
        """The body bytes since the last call."""
        pieces = self._pieces
        if not pieces:
            return b""
        payload = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        pieces.clear()
        return payload

    def feed(self, data: bytes) -> int:
        # A body can only end behind CRLF CRLF. llhttp does not say where it stopped, so it is given the bytes up to
        # each such place: when it is done there, and only there, the rest belongs to the next message.
        size = len(data)
        body = self._body
        self._seen += size
        view = memoryview(data)
        at = 0
        try:
            for end in self._ends(data):
                self._parser.feed_data(view[at:end])
                at = end
                if self.done:
                    self._seen -= size - at
                    return at
            if at < size:
                self._parser.feed_data(view[at:])
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            return -1
        self._since = self._since + size if self._body == body else 0
        if self.done or self._since > TRAILERS or self._seen - self._body > SLACK + RATIO * self._body:
            return -1
        self._tail = data[-3:] if size >= 3 else (self._tail + data)[-3:]
        return size

    def _ends(self, data: bytes) -> list[int]:
        """The places in `data` behind a CRLF CRLF, which may have begun in the data before."""
        ends = []
        tail = len(self._tail)
        for place, back in ((self._tail + data[:3], tail), (data, 0)) if tail else ((data, 0),):
            at = place.find(_END)
            while at >= 0:
                ends.append(at + 4 - back)
                at = place.find(_END, at + 2)
        return ends


class Intake:
    """A request body on its way: known length or chunked."""

    __slots__ = ("_chunks", "_left", "done", "size")

    def __init__(self, length: int, fields: int) -> None:
        self._left = length
        self._chunks = Dechunker(fields) if length == CHUNKED else None
        self.done = False
        self.size = 0  # bytes of body so far

    def take(self, data: bytes) -> tuple[bytes, bytes] | None:
        """What to send on for `data`, and the bytes that belong to the next request; None when it is refused."""
        chunks = self._chunks
        if chunks is None:
            rest = data[self._left :]
            out = data[: self._left] if rest else data
            self._left -= len(out)
            self.size += len(out)
            self.done = self._left == 0
            return out, rest
        used = chunks.feed(data)
        if used < 0:
            return None
        payload = chunks.payload()
        self.size += len(payload)
        self.done = chunks.done
        out = encode(payload)
        return (out + last(chunks.trailers) if self.done else out), data[used:]
