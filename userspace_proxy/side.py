"""One of the two connections of a relay: what it receives goes to the other, and so do back-pressure and its end.

What an end means for the whole relay, the relay knows.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, cast

from userspace_proxy.wire import reset

if TYPE_CHECKING:
    from userspace_proxy.tcp import Relay

HIGH_WATER = 64 * 1024  # bytes that one side has not taken; above, the other one is not read


class Side(asyncio.Protocol):
    def __init__(self, relay: Relay) -> None:
        self.relay = relay
        self.other: Side = self  # the relay sets it
        self.transport: asyncio.Transport | None = None
        self.received = 0
        self.ended = False  # the peer has sent FIN
        self.gone = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=HIGH_WATER)
        self.relay.made(self)

    def data_received(self, data: bytes) -> None:
        self.received += len(data)
        if self.other.transport is not None:
            self.other.transport.write(data)
        else:
            self.relay.early(data)

    def eof_received(self) -> bool:
        self.ended = True
        self.relay.half_closed(self)
        return True  # keep the transport: the other direction lives on

    def pause_writing(self) -> None:
        if self.other.transport is not None:
            self.other.transport.pause_reading()

    def resume_writing(self) -> None:
        other = self.other
        if other.transport is not None and not other.ended and not other.transport.is_closing():
            other.transport.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        self.gone = True
        self.relay.lost(self, exc)

    def reset(self) -> None:
        """Close by RST: the peer learns that the stream was cut, which a FIN would hide."""
        if self.transport is not None:
            reset(self.transport)
