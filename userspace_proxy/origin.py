"""Where an accepted connection really wanted to go, and who made it. Comes from a table that only the kernel writes."""

from __future__ import annotations

from collections.abc import Callable


class Origin:
    """`address`:`port` is what the application dialled, `workload` who it is, `netns` the cookie of its namespace."""

    __slots__ = ("address", "netns", "port", "workload")

    def __init__(self, address: str, port: int, workload: str, netns: int) -> None:
        self.address = address
        self.port = port
        self.workload = workload
        self.netns = netns


Lookup = Callable[[int, str, int], Origin | None]
"""(namespace, client address, client port) → what was dialled, or None when no connect hook led the connection here."""
