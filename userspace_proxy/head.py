"""Reads and rewrites HTTP/1.1 heads: what is accepted here is the only thing that is ever sent on. Pure.

One strict grammar, checked on the raw bytes, and llhttp as a second witness that must see the same framing. Everything
ambiguous is a Fault. What is prepared here (bytes to send, numbers, words for the log) depends on the header lines
alone, so that a connection keeps it and pays nothing when the next head has the same lines.
"""

from __future__ import annotations

import re

import httptools

from userspace_proxy.grammar import (
    ABSOLUTE,
    AUTHORITY,
    BAD,
    CHUNKED,
    EXPECTATION,
    NO_CONNECT,
    STATUS,
    UNTIL_CLOSE,
    Fault,
    Hop,
    Witness,
    agrees,
    lines_fault,
)
from userspace_proxy.limits import Limits

_TRACE = re.compile(rb"[0-9a-f]{2}-([0-9a-f]{32})-[0-9a-f]{16}-[0-9a-f]{2}")
_REQUEST = re.compile(
    rb"(?mi)^(connection|content-length|expect|host|http2-settings|keep-alive|proxy-connection|te|traceparent|"
    rb"transfer-encoding|upgrade|user-agent|x-forwarded-for|x-meshbpf-[^:]*|x-request-id):([^\r]*)\r\n"
)
_ANSWER = re.compile(
    rb"(?mi)^(connection|content-length|keep-alive|proxy-connection|te|transfer-encoding|upgrade|x-meshbpf-[^:]*)"
    rb":([^\r]*)\r\n"
)


class RequestFields:
    """The header lines of a request. `out` is what goes on, without the empty line at the end."""

    __slots__ = (
        "authority", "close", "forwarded_for", "keep_alive", "length", "out", "request_id", "simple",
        "trace_id", "user_agent", "websocket",
    )  # fmt: skip

    def __init__(self) -> None:
        self.out = b""
        self.length = 0
        self.close = False
        self.keep_alive = False
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


def request_target(method: bytes, target: bytes) -> tuple[bytes, bytes | None] | Fault:
    """The target to send on, and the host that an absolute one names (RFC 9112 3.2)."""
    if method == b"CONNECT":
        return NO_CONNECT
    if target[0] == 47 or (target == b"*" and method == b"OPTIONS"):
        return target, None
    absolute = ABSOLUTE.fullmatch(target)
    if absolute is None or not AUTHORITY.fullmatch(absolute[1]):
        return BAD
    host, target = absolute.groups()
    if not target:
        target = b"*" if method == b"OPTIONS" else b"/"
    elif target[0] != 47:
        target = b"/" + target
    return target, host


def request_fields(
    lines: bytes, minor: int, host: bytes | None, dialled: bytes, limits: Limits
) -> RequestFields | Fault:
    """Read the header lines of a request of version 1.`minor`.

    `host` is the authority of an absolute target, which replaces the Host line; `dialled` stands in for one that an
    HTTP/1.0 caller need not send.
    """
    if (fault := lines_fault(lines, limits)) is not None:
        return fault
    fields = RequestFields()
    hop = Hop()
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
    witness = Witness()
    line = b"POST / HTTP/1.1\r\n" if minor else b"POST / HTTP/1.0\r\n"
    if not agrees(witness, httptools.HttpRequestParser(witness), line + lines + b"\r\n", length):
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
    if lines_fault(lines, limits) is not None:
        return None
    answer = AnswerHead(int(status[2]))
    code = answer.status
    hop = Hop()
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
    witness = Witness()
    plain = b"HTTP/1.1 200 OK\r\n" + head[status.end() :]
    if not agrees(witness, httptools.HttpResponseParser(witness), plain, length):
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
