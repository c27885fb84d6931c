"""Whether a process may read its sockets by splice(2): a member's reader that does would stall (promise 2).

The reasoning: splice needs a pipe, so a process that spliced an earlier answer of its connection holds both ends of
one; the proxy asks only behind answers that had a body. A pipe whose reading end is in an epoll set of the process
wakes an event loop (Go, Java, libevent); it carries no payload. The limits: a process that opens its first pipe within
a second of our look, or later than joining, or that was handed the socket by the one that connected, is not seen. A
process that we may not look at counts as one that may.
"""

from __future__ import annotations

import os
import select
import time
from collections.abc import Iterable
from dataclasses import dataclass

KEEP = 1.0  # seconds that a look stays valid
COST = 100  # ... or this many times as long as it took: a process with 10 000 files is not looked at all day
PROCESSES = 64  # remembered at a time, a file descriptor each
ACCESS_MODE = os.O_RDONLY | os.O_WRONLY | os.O_RDWR


def holds_payload_pipe(pid: int) -> bool:
    """Both ends of a pipe that no epoll set waits for are open in `pid`. Raises OSError when it cannot be seen."""
    folder = f"/proc/{pid}"
    readers: dict[str, int] = {}
    writers: set[str] = set()
    epolls: list[str] = []
    for number in os.listdir(f"{folder}/fd"):
        try:
            target = os.readlink(f"{folder}/fd/{number}")
            if target.startswith("pipe:"):
                mode = _flags(folder, number) & ACCESS_MODE
                if mode != os.O_WRONLY:
                    readers[target] = int(number)
                if mode != os.O_RDONLY:
                    writers.add(target)
            elif target == "anon_inode:[eventpoll]":
                epolls.append(number)
        except FileNotFoundError:
            continue  # closed while we looked
    both = {readers[pipe] for pipe in readers.keys() & writers}
    return bool(both - _waited_for(folder, epolls)) if both else False


def _flags(folder: str, number: str) -> int:
    with open(f"{folder}/fdinfo/{number}", encoding="ascii") as file:
        for line in file:
            if line.startswith("flags:"):
                return int(line.split()[1], 8)
    return os.O_RDWR


def _waited_for(folder: str, epolls: list[str]) -> set[int]:
    found = set()
    for number in epolls:
        with open(f"{folder}/fdinfo/{number}", encoding="ascii") as file:
            found |= {int(line.split()[1]) for line in file if line.startswith("tfd:")}
    return found


@dataclass(slots=True)
class _Look:
    process: int  # a pidfd: it stays with this process when its number is given to another
    splices: bool
    until: float


class Pipes:
    """Remembers looks, one per process, for as long as the process lives and the look is fresh."""

    def __init__(self) -> None:
        self._looks: dict[int, _Look] = {}

    def may_splice(self, pid: int) -> bool:
        begin = time.monotonic()
        look = self._looks.get(pid)
        if look is not None and begin < look.until and not _ended([look.process]):
            return look.splices
        self._forget(pid)
        try:
            process = os.pidfd_open(pid)
        except OSError:
            return True
        try:
            splices = holds_payload_pipe(pid)
        except OSError:
            splices = True
        now = time.monotonic()
        self._forget_ended()
        if len(self._looks) >= PROCESSES:
            for old in [old for old, kept in self._looks.items() if kept.until < now] or [next(iter(self._looks))]:
                self._forget(old)
        self._looks[pid] = _Look(process, splices, now + max(KEEP, COST * (now - begin)))
        return splices

    def close(self) -> None:
        for pid in list(self._looks):
            self._forget(pid)

    def _forget_ended(self) -> None:
        """Else a worker that nobody asks any more would hold a descriptor for each of its last callers."""
        ended = _ended([look.process for look in self._looks.values()])
        for pid in [pid for pid, look in self._looks.items() if look.process in ended]:
            self._forget(pid)

    def _forget(self, pid: int) -> None:
        look = self._looks.pop(pid, None)
        if look is not None:
            os.close(look.process)


def _ended(processes: Iterable[int]) -> set[int]:
    """Those of the pidfds whose processes have ended."""
    poller = select.poll()
    for process in processes:
        poller.register(process, select.POLLIN)
    return {process for process, _event in poller.poll(0)}
