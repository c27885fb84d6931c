"""When a connection joins the redirect table and leaves it. How that is done, the loader knows.

A connection may join while a whole request of it has been read and not been answered: only then has everything that
either side ever sent been read by the other, which is what joining asks for. What counts as proof of worth is answers
with a body, because only they show how the application reads: HAProxy makes the pipe by which the accelerator knows a
reader that splices when it meets its first body, and a member that splices would stall.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from userspace_proxy.route import Route
    from userspace_proxy.stream import Stream


class Membership(Protocol):
    """A connection that is in the redirect table; `inside` as long as the application's socket is."""

    inside: bool

    def fits(self, size: int) -> bool:
        """Will an answer of `size` bytes, written now, be redirected whole? Else: leave before writing it."""
        ...

    def leave(self) -> None:
        """From now on towards the application by TCP. Still `inside` when it has not read all: ask again later."""
        ...


class Accelerator(Protocol):
    def join(
        self, netns: int, client_addr: str, client_port: int, local_addr: str, local_port: int
    ) -> Membership | None:
        """Try to enter the connection, of which a request is read and not answered. None: not now."""
        ...


class Shortcut:
    """One connection's way into the redirect table and out of it."""

    __slots__ = ("_accelerator", "_after", "_answered", "_join_at", "_leaving", "_membership")

    def __init__(self, accelerator: Accelerator, after: int) -> None:
        self._accelerator = accelerator
        self._after = after
        self._answered = 0  # with a body
        self._join_at = after  # how many answers make it worth trying
        self._membership: Membership | None = None
        self._leaving = False

    @property
    def joined(self) -> bool:
        return self._membership is not None

    def asked(self, netns: int, transport: Stream) -> None:
        """A whole request has been read, nothing follows it yet: join, when the connection has proven worth it."""
        if self._leaving:
            self.leave()
        if self._membership is not None or self._answered < self._join_at or transport.get_write_buffer_size():
            return
        peer, local = transport.get_extra_info("peername"), transport.get_extra_info("sockname")
        self._membership = self._accelerator.join(netns, peer[0], peer[1], local[0], local[1])
        if self._membership is not None:
            transport.holds = False  # the room that the kernel grants is without what it has not been given yet
        # Refused: the reason may pass, so ask again, but ever more rarely.
        self._join_at = self._answered * 2 + 1

    def answering(self, size: int) -> None:
        """`size` bytes follow; what the table will not take whole goes by TCP."""
        membership = self._membership
        if membership is not None and (self._leaving or not membership.fits(size)):
            self.leave()

    def answered(self) -> None:
        """An answer with a body has been written whole."""
        self._answered += 1

    def going_on(self) -> None:
        """More bytes follow by TCP, of something that began so."""
        if self._leaving:
            self.leave()

    def leave(self) -> None:
        """What follows must not go through the table: its length is not known, or nobody is there to send more."""
        membership = self._membership
        if membership is not None:
            membership.leave()
            self._leaving = membership.inside
            if not membership.inside:
                self._membership = None
                self._join_at = self._answered + self._after


def shortcut_of(accelerator: Accelerator | None, route: Route | None, after: int) -> Shortcut | None:
    """The way for a new connection, if its service may have one."""
    return Shortcut(accelerator, after) if accelerator is not None and route is not None and route.accelerated else None
