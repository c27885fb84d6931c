"""Where the redirect table is joined and left: the data path's view of it. What a membership is, the loader knows."""

from __future__ import annotations

from typing import Protocol


class Membership(Protocol):
    """A connection that is in the redirect table."""

    def leave(self) -> None:
        """From now on towards the application by TCP. Called before answers whose length is unknown or large."""
        ...


class Accelerator(Protocol):
    def join(
        self, netns: int, client_addr: str, client_port: int, local_addr: str, local_port: int
    ) -> Membership | None:
        """Try to enter the connection, which is idle: all answers written, nothing buffered. None: not now."""
        ...
