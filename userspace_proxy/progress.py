"""Does a request that is being served move on? Nothing is counted for it: now and then one looks how far it is."""

from __future__ import annotations

from typing import TYPE_CHECKING

from userspace_proxy.wire import waiting

if TYPE_CHECKING:
    from userspace_proxy.exchange import Exchange


class Progress:
    """How far an exchange was at the last look, and since when."""

    __slots__ = ("_at", "_since")

    def __init__(self, now: float) -> None:
        self._at: tuple[int, ...] = ()
        self._since = now

    def forget(self) -> None:
        """Something has moved that no look would show."""
        self._at = ()

    def stalled(self, exchange: Exchange, now: float) -> bool:
        """Has no byte moved for too long, be it that nobody sends or that somebody does not read?"""
        down, record, upstream = exchange.down, exchange.record, exchange.upstream
        left = waiting(upstream.transport) if upstream is not None else 0
        at = (record.bytes_received, record.bytes_sent, waiting(down.transport), left, exchange.tries)
        if at != self._at:
            self._at, self._since = at, now
        return now - self._since >= down.limits.stream_idle
