"""Reads and rewrites HTTP/1.1 heads: what is accepted here is the only thing that is ever sent on. Pure.

One strict grammar, checked on the raw bytes, and llhttp as a second witness that must see the same framing. Everything
ambiguous is a Fault. What is prepared here (bytes to send, numbers, words for the log) depends on the header lines
alone, so that a connection keeps it and pays nothing when the next head has the same lines.
"""

from __future__ import annotations

import re

import httptools

from meshbpf.reason import Reason
from userspace_proxy.limits import Limits

CHUNKED = -1  # the value of `length` when the body is chunked
UNTIL_CLOSE = -2  # … and when it ends with the connection (answers only)
END = b"\r\n\r\n"

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
_TRACE = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST = re.compile(
    rb"(?mi)^(connection|content-length|expect|host|http2-settings|keep-alive|proxy-connection|te|traceparent|"
    rb"transfer-encoding|upgrade|user-agent|x-forwarded-for|x-meshbpf-[^:]*|x-request-id):([^\r]*)\r\n"
)
_ANSWER = re.compile(
    rb"(?mi)^(connection|content-length|keep-alive|proxy-connection|te|transfer-encoding|upgrade|x-meshbpf-[^:]*)"
    rb":([^\r]*)\r\n"
)
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


class RequestFields:
    """The header lines of a request. `out` is what goes on, without the empty line at the end."""

    __slots__ = (
        "authority", "close", "expect", "forwarded_for", "keep_alive", "length", "out", "request_id", "simple",
        "trace_id", "user_agent", "websocket",
    )  # fmt: skip

    def __init__(self) -> None:
        self.out = b""
        self.length = 0
        self.close = False
        self.keep_alive = False
        self.expect = False
        self.simple = False  # HTTP/1.1, no body, the connection goes on
        self.websocket = False
        self.authority: str | None = None
        self.request_id: str | None = None
        self.trace_id: str | None = None
        self.user_agent: str | None = None
        self.forwarded_for: str | None = None


class AnswerHead:
    """`out` is status line and header lines as they go on, without framing that is ours to choose and the empty line.

    `verbatim`: the head may be sent on exactly as it came.
    """

    __slots__ = ("close", "length", "out", "status", "verbatim", "websocket")

    def __init__(self, status: int) -> None:
        self.status = status
        self.out = b""
        self.length = UNTIL_CLOSE
        self.close = False
        self.verbatim = False
        self.websocket = False


class _Witness:
    """llhttp's view of a head: is the message complete without a body?"""

    __slots__ = ("complete",)

    def __init__(self) -> None:
        self.complete = False

    def on_message_complete(self) -> None:
        self.complete = True


def _agrees(witness: _Witness, parser: httptools.HttpRequestParser, head: bytes, length: int) -> bool:
    try:
        parser.feed_data(head)
    except httptools.HttpParserUpgrade:
        return True  # its framing is that of a message without body; ours is checked where the upgrade is allowed
    except httptools.HttpParserError:
        return False
    return witness.complete is (length == 0)


class _Hop:
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


def _lines_fault(lines: bytes, limits: Limits) -> Fault | None:
    if lines.count(b"\n") > limits.fields:
        return TOO_LARGE
    return None if _LINES.fullmatch(lines) else BAD


def request_fields(
    lines: bytes, minor: int, host: bytes | None, dialled: bytes, limits: Limits
) -> RequestFields | Fault:
    """Read the header lines of a request of version 1.`minor`.

    `host` is the authority of an absolute target, which replaces the Host line; `dialled` stands in for one that an
    HTTP/1.0 caller need not send.
    """
    if (fault := _lines_fault(lines, limits)) is not None:
        return fault
    fields = RequestFields()
    hop = _Hop()
    hosts = 0
    upgrade = b""
    trailers = False
    for match in _REQUEST.finditer(lines):
        name = match[1].lower()
        value = match[2].strip(b" \t")
        if name == b"host":
            hosts += 1
            if hosts > 1 or not AUTHORITY.fullmatch(value):
                return BAD
            if host is None:
                fields.authority = value.decode("latin-1")
            else:
                hop.drop.append(match.span())
        elif name == b"user-agent":
            fields.user_agent = value.decode("latin-1")
        elif name == b"x-request-id":
            if not value:
                hop.drop.append(match.span())
            elif fields.request_id is None:
                fields.request_id = value.decode("latin-1")
        elif name == b"traceparent":
            trace = _TRACE.match(value)
            fields.trace_id = trace[1].decode() if trace else None
        elif name == b"x-forwarded-for":
            fields.forwarded_for = value.decode("latin-1")
        elif name == b"expect":
            if value.lower() != b"100-continue":
                return EXPECTATION
            fields.expect = minor == 1
            if minor == 0:  # RFC 9110: to be ignored when a 1.0 caller sends it
                hop.drop.append(match.span())
        else:
            if not hop.take(name, value, match.span()):
                return BAD
            if name == b"upgrade":
                upgrade = upgrade + b"," + value if upgrade else value
            elif name == b"te" and b"trailers" in value.lower():
                trailers = True
    if hop.chunked and (minor == 0 or hop.length >= 0):
        return BAD
    if hosts == 0 and minor == 1:
        return BAD
    length = fields.length = CHUNKED if hop.chunked else max(0, hop.length)
    witness = _Witness()
    line = b"POST / HTTP/1.1\r\n" if minor else b"POST / HTTP/1.0\r\n"
    if not _agrees(witness, httptools.HttpRequestParser(witness), line + lines + b"\r\n", length):
        return BAD
    fields.close = hop.close
    fields.keep_alive = hop.keep_alive
    fields.simple = minor == 1 and length == 0 and not hop.close
    out = [hop.rewrite(lines)]
    if host is not None or hosts == 0:
        authority = dialled if host is None else host
        fields.authority = authority.decode("latin-1")
        out.insert(0, b"host: %b\r\n" % authority)
    if length == CHUNKED:
        out.append(b"transfer-encoding: chunked\r\n")
    if trailers:
        out.append(b"te: trailers\r\n")
    if minor and hop.upgrade and upgrade.lower() == b"websocket" and length == 0:
        fields.websocket = True
        out.append(b"connection: upgrade\r\nupgrade: websocket\r\n")
    fields.out = b"".join(out) if len(out) > 1 else out[0]
    return fields


def answer_head(head: bytes, limits: Limits) -> AnswerHead | None:
    """Read a whole answer head (with its empty line); None when it is not valid HTTP/1.1."""
    status = STATUS.match(head)
    if status is None:
        return None
    lines = head[status.end() : -2]
    if _lines_fault(lines, limits) is not None:
        return None
    answer = AnswerHead(int(status[2]))
    code = answer.status
    hop = _Hop()
    upgrade = b""
    for match in _ANSWER.finditer(lines):
        name = match[1].lower()
        value = match[2].strip(b" \t")
        if not hop.take(name, value, match.span()):
            return None
        if name == b"upgrade":
            upgrade = value
    minor = status[1] == b"1"
    if hop.chunked and (not minor or hop.length >= 0):
        return None
    bodiless = code < 200 or code == 204
    if bodiless and (hop.chunked or hop.length > 0):
        return None
    length = CHUNKED if hop.chunked else hop.length if hop.length >= 0 else UNTIL_CLOSE
    witness = _Witness()
    plain = b"HTTP/1.1 200 OK\r\n" + head[status.end() :]
    if not _agrees(witness, httptools.HttpResponseParser(witness), plain, length):
        return None
    answer.length = 0 if bodiless else length
    answer.close = hop.close or (not minor and not hop.keep_alive)
    out = hop.rewrite(lines)
    if bodiless and hop.length == 0:
        out = b"\r\n".join(line for line in out.split(b"\r\n") if not line.lower().startswith(b"content-length:"))
    if code == 101:
        answer.websocket = hop.upgrade and upgrade.lower() == b"websocket"
        out += b"connection: upgrade\r\nupgrade: websocket\r\n"
    first = head[: status.end()]
    if minor:
        answer.verbatim = out == lines and len(first) > 14
    if not answer.verbatim:
        first = b"HTTP/1.1" + first[8:12] + (first[12:] if len(first) > 14 else b" \r\n")
    answer.out = first + out
    return answer
