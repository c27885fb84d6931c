"""The grammar of HTTP/1.1 heads, as strict as senders can be asked to be, and what framing and hop-by-hop lines mean.

Shared by requests and answers. Pure; raw bytes in, values out. A second witness, llhttp, must see the same framing.
"""

from __future__ import annotations

import re

import httptools

from meshbpf.reason import Reason
from userspace_proxy.limits import Limits

CHUNKED = -1  # the value of `length` when the body is chunked
UNTIL_CLOSE = -2  # … and when it ends with the connection (answers only)
END = b"\r\n\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n"
METHODS = {name.encode(): name for name in ("GET", "HEAD", "POST", "PUT", "DELETE", "PATCH", "OPTIONS", "TRACE")}
VERSIONS = {b"0": "HTTP/1.0", b"1": "HTTP/1.1"}

_NAME = rb"[!#$%&'*+\-.^_`|~0-9A-Za-z]"
# Raw UTF-8 in targets is common and harmless; a fragment never leaves an honest client.
LINE = re.compile(rb"(" + _NAME + rb"++) ([^\x00-\x20\x7f#]++) HTTP/1\.([01])\r\n")
STATUS = re.compile(rb"HTTP/1\.([01]) ([1-9][0-9]{2})(?: [\t\x20-\x7e\x80-\xff]*+)?\r\n")
_LINES = re.compile(rb"(?:" + _NAME + rb"++:[\t\x20-\x7e\x80-\xff]*+\r\n)*+")
BARE = re.compile(rb"(?<!\r)\n|\r(?![\n]|\Z)")
ABSOLUTE = re.compile(rb"(?i)https?://([^/?]*)(.*)", re.S)
AUTHORITY = re.compile(rb"(?:[A-Za-z0-9\-._~!$&'()*+,;=%]+|\[[0-9A-Fa-f:.]+\])(?::[0-9]{0,5})?")
_TOKEN = re.compile(_NAME + rb"+")
_NUMBER = re.compile(rb"[0-9]{1,18}")
# Naming one of these in Connection must not make us drop what the endpoint relies on.
_PROTECTED = frozenset(
    b"authorization cache-control content-length content-type cookie forwarded host traceparent tracestate"
    b" x-forwarded-for x-forwarded-host x-forwarded-proto x-request-id".split()
)


class Fault:
    """A head that is refused. `status` is what the caller gets when the head was a request's."""

    __slots__ = ("reason", "status")

    def __init__(self, reason: Reason, status: int) -> None:
        self.reason = reason
        self.status = status


BAD = Fault(Reason.BAD_REQUEST, 400)
TOO_LONG_LINE = Fault(Reason.HEAD_TOO_LARGE, 414)
TOO_LARGE = Fault(Reason.HEAD_TOO_LARGE, 431)
EXPECTATION = Fault(Reason.EXPECTATION_UNKNOWN, 417)
NO_CONNECT = Fault(Reason.CONNECT_METHOD, 405)
TOO_SLOW = Fault(Reason.HEAD_TIMEOUT, 408)


def partial_fault(data: bytes, scanned: int, limits: Limits) -> Fault | None:
    """Why the beginning of a request head can be no good, if so; `scanned` bytes of it were looked at before."""
    if BARE.search(data, max(0, scanned - 1)):
        return BAD
    if len(data) > limits.request_line and b"\r\n" not in data[: limits.request_line + 2]:
        return TOO_LONG_LINE
    return TOO_LARGE if len(data) > limits.head else None


def whole_fault(data: bytes, end: int, limits: Limits) -> Fault:
    """Why a request head that ends at `end` is refused: its line does not match, or something is too long."""
    if data.find(b"\r\n") > limits.request_line:
        return TOO_LONG_LINE
    return TOO_LARGE if end > limits.head else BAD


class Witness:
    """llhttp's view of a head: is the message complete without a body?"""

    __slots__ = ("complete",)

    def __init__(self) -> None:
        self.complete = False

    def on_message_complete(self) -> None:
        self.complete = True


def agrees(witness: Witness, parser: httptools.HttpRequestParser, head: bytes, length: int) -> bool:
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        return True  # its framing is that of a message without body; ours is checked where the upgrade is allowed
    except httptools.HttpParserError:
        return False
    return witness.complete is (length == 0)


class Hop:
    """What Connection, Content-Length and Transfer-Encoding said, the same for requests and answers."""

    __slots__ = ("canonical", "chunked", "close", "drop", "keep_alive", "length", "named", "upgrade")

    def __init__(self) -> None:
        self.length = -1
        self.canonical = b""
        self.chunked = False
        self.close = False
        self.keep_alive = False
        self.upgrade = False
        self.named: set[bytes] = set()
        self.drop: list[tuple[int, int]] = []

    def take(self, name: bytes, value: bytes, span: tuple[int, int]) -> bool:
        """Account for one line; False when it is refused."""
        if name == b"content-length":
            if self.length >= 0 or not _NUMBER.fullmatch(value):
                return False
            self.length = int(value)
            if value[0] == 48 and len(value) > 1:  # leading zeros: readers differ, so it is written anew
                self.drop.append(span)
                self.canonical = b"content-length: %d\r\n" % self.length
            return True
        self.drop.append(span)
        if name == b"transfer-encoding":
            if self.chunked or value.lower() != b"chunked":
                return False
            self.chunked = True
        elif name == b"connection":
            for part in value.lower().split(b","):
                token = part.strip(b" \t")
                if token == b"close":
                    self.close = True
                elif token == b"keep-alive":
                    self.keep_alive = True
                elif token == b"upgrade":
                    self.upgrade = True
                elif token:
                    if not _TOKEN.fullmatch(token):
                        return False
                    self.named.add(token)
        return True

    def rewrite(self, lines: bytes) -> bytes:
        """The lines that go on, without those taken out, and with a canonical Content-Length."""
        if self.drop:
            parts, at = [], 0
            for start, end in self.drop:
                parts.append(lines[at:start])
                at = end
            parts.append(lines[at:])
            lines = b"".join(parts)
        named = self.named - _PROTECTED
        if named:
            kept = [line for line in lines.split(b"\r\n") if line.partition(b":")[0].lower() not in named]
            lines = b"\r\n".join(kept)
        return lines + self.canonical if self.canonical else lines


def lines_fault(lines: bytes, limits: Limits) -> Fault | None:
    if lines.count(b"\n") > limits.fields:
        return TOO_LARGE
    return None if _LINES.fullmatch(lines) else BAD
