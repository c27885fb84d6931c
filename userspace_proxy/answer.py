"""The answer's way back: what an endpoint said, or we say ourselves, written to the caller and noted in the record.

Whatever is done to answers is done here, on `pass_whole` (complete, of known length: the frequent case), on `pass_head`
and `pass_body` (all others), and on `reply_locally`. Framing is written anew; every write is first told to the
shortcut, because what the redirect table does not take whole must go by TCP.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from meshbpf.reason import Reason
from userspace_proxy.body import encode, last
from userspace_proxy.life import ANSWERING
from userspace_proxy.reply import CLOSE, ENDINGS, KEEP, KEEP_10, Reply
from userspace_proxy.tunnel import Tunnel

if TYPE_CHECKING:
    from userspace_proxy.exchange import Exchange
    from userspace_proxy.head import AnswerHead
    from userspace_proxy.upstream import Upstream

HEAD_MARGIN = 64  # at least what ENDINGS adds to a head
_TE = b"transfer-encoding: chunked\r\n"


def pass_interim(exchange: Exchange, answer: AnswerHead) -> None:
    """100 Continue and its like; HTTP/1.0 knows none."""
    if exchange.progress is not None:
        exchange.progress.forget()
    down = exchange.down
    if not down.version_10:
        if down.shortcut is not None:
            down.shortcut.leave()
        down.transport.write(answer.out + b"\r\n")


def pass_whole(exchange: Exchange, answer: AnswerHead, data: bytes, end: int) -> None:
    """The complete answer, of known length: data[end:] is its body."""
    down = exchange.down
    ending = KEEP if exchange.fields.simple and not down.eof and not down.proxy.draining else ending_of(exchange)
    if not answer.verbatim or ending != KEEP:
        data, end = b"".join((answer.out, ENDINGS[ending], data[end:])), len(answer.out) + len(ENDINGS[ending])
    if down.shortcut is not None:
        down.shortcut.answering(len(data))
    down.transport.write(data)
    record = exchange.record
    record.response_code = answer.status
    record.bytes_sent = len(data) - end
    now = down.now()
    record.upstream_service_time_ms = (now - exchange.started) * 1e3
    exchange.finish(now, ending)


def pass_head(
    exchange: Exchange, answer: AnswerHead, length: int, payload: bytes, done: bool, trailers: bytes = b""
) -> None:
    """The head of an answer that is chunked, long, or ends with its connection, and the first bytes of its body."""
    down = exchange.down
    chunked = length < 0 and not down.version_10
    ending = CLOSE if length < 0 and not chunked else ending_of(exchange)
    if down.shortcut is not None:
        if length < 0:
            down.shortcut.leave()
        else:
            down.shortcut.answering(len(answer.out) + HEAD_MARGIN + length)
    out = [answer.out, _TE, ENDINGS[ending]] if chunked else [answer.out, ENDINGS[ending]]
    exchange.chunked = chunked
    exchange.state = ANSWERING
    record = exchange.record
    record.response_code = answer.status
    record.upstream_service_time_ms = (down.now() - exchange.started) * 1e3
    down.ending = ending
    if payload:
        record.bytes_sent += len(payload)
        out.append(encode(payload) if chunked else payload)
    if done and chunked:
        out.append(last(trailers))
    down.transport.write(b"".join(out))
    if done:
        exchange.finish(down.now(), ending)


def pass_body(exchange: Exchange, payload: bytes, done: bool, trailers: bytes = b"") -> None:
    """More of the answer's body, the rest of it when `done`."""
    down = exchange.down
    exchange.record.bytes_sent += len(payload)
    if exchange.chunked:
        payload = encode(payload) + last(trailers) if done else encode(payload)
    if payload:
        if down.shortcut is not None:
            down.shortcut.going_on()
        down.transport.write(payload)
    if done:
        exchange.finish(down.now(), down.ending)


def reply_locally(exchange: Exchange, reply: Reply) -> None:
    """Our own answer instead of an endpoint's."""
    down = exchange.down
    reply.tell(exchange.record, exchange.head_only)
    ending = CLOSE if reply.reason in (Reason.BAD_REQUEST, Reason.BODY_TIMEOUT) else ending_of(exchange)
    out = reply.bytes(ending, exchange.head_only)
    if down.shortcut is not None:
        down.shortcut.answering(len(out))
    down.transport.write(out)
    exchange.finish(down.now(), ending)


def ending_of(exchange: Exchange) -> int:
    """How the caller's connection goes on behind an answer that does not end by closing it."""
    down, fields = exchange.down, exchange.fields
    if fields.close or not exchange.whole_request or down.last:
        return CLOSE
    if down.version_10:
        return KEEP_10 if fields.keep_alive else CLOSE
    return KEEP


def open_tunnel(exchange: Exchange, upstream: Upstream, answer: AnswerHead, data: bytes) -> None:
    """The endpoint agreed to speak WebSocket: from here on bytes, to and fro, until both have ended."""
    exchange.state = ANSWERING
    exchange.upstream = upstream.exchange = None
    Tunnel(exchange, upstream).begin(answer, data)
