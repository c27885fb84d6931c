"""Workers that outlived their agent: the next one learns from them what they listen on, and lets them finish.

They are found by their sockets in the run directory. One that does not answer hangs, and holds the proxy's port: it is
killed, since its connections wait for nothing.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from loader.instance import Instance
from meshbpf.model import Mesh
from meshbpf.runtime import about
from meshbpf.runtime.channel import Channel
from meshbpf.runtime.supervisor import REPORTS

log = logging.getLogger("orphans")
ANSWER_SECONDS = 2.0
NAME = "orphan-"  # of what an orphan reports, before its pid


class Orphan:
    """One of them, once it has answered. What it counts, `report` is told (see Supervisor), and of its end."""

    def __init__(self, pid: int, sock: socket.socket, report: REPORTS) -> None:
        self.pid = pid
        self._report = report
        self._listeners: list[tuple[int, list[int]]] = []
        self._said = {word: asyncio.Event() for word in ("hello", "using", "handed over", "deaf")}
        self._gone = asyncio.Event()
        self._channel = Channel(sock, self._receive, self._closed)

    def _receive(self, message: dict[str, Any], fds: list[int]) -> None:
        if message["type"] == "listener":
            self._listeners.append((int(message["netns"]), fds))
            return
        if message["type"] == "stats":
            self._report(f"{NAME}{self.pid}", message["blob"].read())
        for fd in fds:
            os.close(fd)
        if message["type"] in self._said:
            self._said[message["type"]].set()

    def _closed(self) -> None:
        self._report(f"{NAME}{self.pid}", None)
        self._gone.set()
        for event in self._said.values():
            event.set()

    async def says(self, word: str) -> bool:
        """Whether it says so in time."""
        try:
            await asyncio.wait_for(self._said[word].wait(), ANSWER_SECONDS)
        except TimeoutError:
            return False
        return not self._gone.is_set()

    async def use(self, about: bytes) -> bool:
        """Serve this mesh until the end: the kernel leads callers of its new services to it too. Whether it does."""
        self._channel.send({"type": "mesh"}, blob=about)
        took = await self.says("using")
        if not took:
            log.warning("an earlier worker does not take the new mesh: it serves the last one pid=%d", self.pid)
        return took

    def leave(self) -> None:
        """Let it serve on by itself."""
        self._channel.close()

    async def hand_over(self) -> list[tuple[int, list[int]]]:
        """(namespace, [its descriptor, listeners…]) for each namespace it serves; the descriptors become ours."""
        self._channel.send({"type": "handover"})
        await self.says("handed over")
        given, self._listeners = self._listeners, []
        return given

    async def turn_deaf(self, seconds: float) -> None:
        """Begin to drain; returns when it accepts no more."""
        self._channel.send({"type": "drain", "seconds": seconds})
        await self.says("deaf")

    async def end(self, seconds: float) -> None:
        """Drain it, if that has not begun; kill it when it has not ended in time."""
        self._channel.send({"type": "drain", "seconds": seconds})
        try:
            await asyncio.wait_for(self._gone.wait(), seconds + ANSWER_SECONDS)
        except TimeoutError:
            await self.kill("has not ended after the drain")

    async def kill(self, why: str) -> None:
        """Returns when it is dead, so that the ports it held are free."""
        log.warning("an earlier worker %s, killing it pid=%d", why, self.pid)
        loop, dead = asyncio.get_running_loop(), asyncio.Event()
        try:
            pidfd = os.pidfd_open(self.pid)
        except ProcessLookupError:
            return
        loop.add_reader(pidfd, dead.set)
        try:
            signal.pidfd_send_signal(pidfd, signal.SIGKILL)
            await asyncio.wait_for(dead.wait(), ANSWER_SECONDS)
        except (ProcessLookupError, TimeoutError) as error:
            log.warning("killed it, and then error=%r pid=%d", error, self.pid)
        finally:
            loop.remove_reader(pidfd)
            os.close(pidfd)
            self._channel.close()


def _connected(instance: Instance) -> Iterator[tuple[int, socket.socket]]:
    """(pid, socket) of every worker of the instance that lives; dead ones' sockets are removed."""
    for path in sorted(instance.run.glob("worker-*.sock")):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            sock.connect(str(path))
        except OSError:
            sock.close()
            path.unlink(missing_ok=True)
            continue
        yield int(path.stem.split("-")[1]), sock


def _unheard(_incarnation: str, _statistics: Any) -> None:
    """For who keeps no metrics."""


async def greet(instance: Instance, report: REPORTS = _unheard) -> list[Orphan]:
    """Every worker without an agent; who asks holds the instance's lock, so no agent lives. Silent ones are killed."""
    found = [Orphan(pid, sock, report) for pid, sock in _connected(instance)]
    answers = await asyncio.gather(*(orphan.says("hello") for orphan in found))
    for orphan, answered in zip(found, answers, strict=True):
        if not answered:
            await orphan.kill("does not answer")
    return [orphan for orphan, answered in zip(found, answers, strict=True) if answered]


async def keep_up(instance: Instance, mesh: Mesh, cgroups: Sequence[Path]) -> bool:
    """Tell every worker without an agent this mesh, and leave it; whether all of them serve it now."""
    found = await greet(instance)
    if not found:
        return True
    more = {"layout": "", "cgroups": [str(path) for path in cgroups], "cookie": 0, "redirect": False}
    told = about.pack(mesh, more)
    took = await asyncio.gather(*(orphan.use(told) for orphan in found))
    for orphan in found:
        orphan.leave()
    return all(took)
