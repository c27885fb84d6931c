"""What the proxy answers by itself: the one place where a reason becomes a status, a response flag and a body.

Words, flags and bodies are Envoy's where Envoy has them. Every reply names its reason in `x-meshbpf-reason`.
"""

from __future__ import annotations

from http import HTTPStatus

from meshbpf.reason import Reason
from meshbpf.record import Record

KEEP, KEEP_10, CLOSE = 0, 1, 2  # how the caller's connection goes on: silently, as HTTP/1.0 asked for it, not at all
ENDINGS = (b"\r\n", b"connection: keep-alive\r\n\r\n", b"connection: close\r\n\r\n")

_BEFORE = "upstream connect error or disconnect/reset before headers. reset reason: "
_OVERLOADED = "x-envoy-overloaded: true\r\n"


class Reply:
    """One local reply, prepared. `details` is what the access log says beside the flag."""

    __slots__ = ("_body", "_head", "details", "flag", "reason", "size", "status")

    def __init__(
        self, reason: Reason, status: int, flag: str | None, details: str, body: str = "", extra: str = ""
    ) -> None:
        self.reason = reason
        self.status = status
        self.flag = flag
        self.details = details
        kind = "content-type: text/plain\r\n" if body else ""
        self._body = body.encode()
        self.size = len(self._body)
        self._head = (
            f"HTTP/1.1 {status} {HTTPStatus(status).phrase}\r\ncontent-length: {self.size}\r\n{kind}{extra}"
            f"x-meshbpf-reason: {reason.word}\r\n"
        ).encode()

    def tell(self, record: Record, head_only: bool) -> None:
        """Write down what the caller gets."""
        record.reason = self.reason.word
        record.response_code = self.status
        record.response_flags = self.flag
        record.response_code_details = self.details
        record.bytes_sent = 0 if head_only else self.size

    def bytes(self, ending: int, head_only: bool) -> bytes:
        """The reply on the wire. `ending` is one of KEEP, KEEP_10, CLOSE."""
        return self._head + ENDINGS[ending] + (b"" if head_only else self._body)


def _upstream(reason: Reason, status: int, flag: str, word: str, extra: str = "") -> Reply:
    details = f"upstream_reset_before_response_started{{{word.replace(' ', '_')}}}"
    return Reply(reason, status, flag, details, _BEFORE + word, extra)


_ALLOW = "allow: DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT, TRACE\r\n"

REPLIES: dict[Reason, Reply] = {
    reply.reason: reply
    for reply in (
        Reply(Reason.NO_SERVICE, 404, "NR", "route_not_found"),
        Reply(Reason.NO_HEALTHY_UPSTREAM, 503, "UH", "no_healthy_upstream", "no healthy upstream"),
        _upstream(Reason.CONNECT_FAILED, 503, "UF", "remote connection failure"),
        _upstream(Reason.CONNECT_TIMEOUT, 503, "UF", "connection timeout"),
        _upstream(Reason.UPSTREAM_RESET, 503, "UC", "connection termination"),
        _upstream(Reason.UPSTREAM_PROTOCOL_ERROR, 502, "UPE", "protocol error"),
        _upstream(Reason.TOO_MANY_CONNECTIONS, 503, "UO", "overflow", _OVERLOADED),
        _upstream(Reason.TOO_MANY_PENDING, 503, "UO", "overflow", _OVERLOADED),
        Reply(Reason.REQUEST_TIMEOUT, 504, "UT", "upstream_response_timeout", "upstream request timeout"),
        Reply(Reason.STREAM_IDLE_TIMEOUT, 504, "SI", "stream_idle_timeout", "stream timeout"),
        Reply(Reason.BAD_REQUEST, 400, "DPE", "http1.codec_error", "bad request"),
        Reply(Reason.HEAD_TOO_LARGE, 431, "DPE", "request_headers_too_large", "request head too large"),
        Reply(Reason.CONNECT_METHOD, 405, "DPE", "connect_not_served", "CONNECT is not served", _ALLOW),
        Reply(Reason.HEAD_TIMEOUT, 408, None, "request_header_timeout", "request timeout"),
        Reply(Reason.BODY_TIMEOUT, 408, None, "request_body_timeout", "request timeout"),
        Reply(Reason.EXPECTATION_UNKNOWN, 417, "DPE", "expectation_unknown", "only 100-continue is understood"),
    )
}
LINE_TOO_LONG = Reply(Reason.HEAD_TOO_LARGE, 414, "DPE", "request_line_too_long", "request line too long")

# Verdicts that say something about the endpoint, if one was chosen: what the metrics count of it.
OUTCOMES = frozenset(
    (
        Reason.CONNECT_FAILED, Reason.CONNECT_TIMEOUT, Reason.UPSTREAM_RESET, Reason.UPSTREAM_CLOSED_EARLY,
        Reason.UPSTREAM_PROTOCOL_ERROR, Reason.REQUEST_TIMEOUT,
    )
)  # fmt: skip
# When the answer has begun there is no reply any more; the log still says why it broke off.
BROKEN_FLAGS = {
    Reason.UPSTREAM_CLOSED_EARLY: "UC",
    Reason.UPSTREAM_PROTOCOL_ERROR: "UPE",
    Reason.REQUEST_TIMEOUT: "UT",
    Reason.STREAM_IDLE_TIMEOUT: "SI",
    Reason.DOWNSTREAM_CLOSED: "DC",
    Reason.BAD_REQUEST: "DPE",
}
