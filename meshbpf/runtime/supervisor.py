"""Starts workers, restarts one that died or hangs, and drains them.

A worker's statistics outlive it: the last report of every incarnation is kept by `Telemetry` (telemetry.Totals).
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from loader.instance import Instance
from loader.source import BPF
from meshbpf.runtime.channel import Channel
from meshbpf.runtime.listeners import Served
from meshbpf.tasks import spawn

log = logging.getLogger("supervisor")
# A read is up to 256 KB: by default glibc gives such a block back to the kernel each time, and faults it in again.
MALLOC = {"MALLOC_MMAP_THRESHOLD_": "4194304", "MALLOC_TRIM_THRESHOLD_": "4194304"}
RESTART_SECONDS = (0.0, 0.1, 0.5, 1.0, 5.0)  # a worker that keeps dying is restarted ever more slowly
LIVED_SECONDS = 10.0  # one that lived so long is restarted at once
HUNG_TICKS = 10  # seconds in a row without its report: a worker that hangs keeps callers waiting for nothing
REPORTS = Callable[[str, Any], None]  # (incarnation, its statistics; None: it is dead)


@dataclass(slots=True, eq=False)
class Handle:
    """One worker process as the agent sees it."""

    number: int
    process: asyncio.subprocess.Process
    channel: Channel | None = None
    told: int = -1  # the generation that was sent to it last
    begun: bool = False  # it has a mesh, so it can listen
    generation: int = -1  # … and that it serves
    trouble: str = ""  # what of the newest mesh it could not follow
    refused: str = ""  # why it does not serve the newest mesh at all
    started: float = 0.0
    silent: int = 0  # ticks since its last word, counted from its first one
    spoken: bool = False


class Supervisor:
    def __init__(
        self, instance: Instance, log_options: dict[str, str], report: REPORTS, changed: Callable[[], None]
    ) -> None:
        self._instance = instance
        self._log_options = log_options
        self._report = report
        self._changed = changed
        self._handles: dict[int, Handle] = {}
        self._pack: Callable[[], bytes] | None = None  # the newest mesh, as a whole
        self._wanted = 0  # its generation
        self._served: dict[int, Served] = {}
        self._deaths: dict[int, int] = {}
        self._stopping = False
        self.restarts = 0

    @property
    def ready(self) -> int:
        """Workers that serve the newest mesh."""
        return sum(1 for handle in self._handles.values() if handle.generation >= self._wanted)

    @property
    def trouble(self) -> str:
        """What a worker could not follow of the newest mesh; empty when all is well."""
        return next((handle.trouble for handle in self._handles.values() if handle.trouble), "")

    @property
    def refusal(self) -> str:
        """Why a worker does not serve the newest mesh; empty when none has refused it."""
        for handle in self._handles.values():
            if handle.refused:
                return f"worker {handle.process.pid} cannot follow: {handle.refused}"
        return ""

    @property
    def pids(self) -> list[int]:
        return [handle.process.pid for handle in self._handles.values()]

    def use(self, generation: int, pack: Callable[[], bytes], change: bytes | None = None, base: int = -1) -> None:
        """Every worker, also one started later, gets this mesh (see about.py): `change`, if there is one, who was last
        told the generation `base`, and all of it, as `pack` gives it, whoever was not.
        """
        self._wanted, self._pack = generation, pack
        whole = None
        for handle in self._handles.values():
            handle.refused = ""
            if handle.channel is None:
                continue
            if change is not None and handle.told == base:
                handle.channel.send({"type": "mesh", "change": True}, blob=change)
            else:
                whole = whole or pack()
                handle.channel.send({"type": "mesh"}, blob=whole)
            handle.told = generation
            self._begin(handle)

    def foretell(self, generation: int, whole: bytes) -> None:
        """Have workers read a mesh that they will soon be told to `use`: then a change of it is enough."""
        for handle in self._handles.values():
            if handle.channel is not None:
                handle.channel.send({"type": "foretell"}, blob=whole)
                handle.told = generation

    def listen(self, served: Served) -> None:
        self._served[served.cookie] = served
        for handle in self._handles.values():
            self._send_listener(handle, served)

    def unlisten(self, cookie: int) -> None:
        self._served.pop(cookie, None)
        for handle in self._handles.values():
            if handle.channel is not None:
                handle.channel.send({"type": "unlisten", "netns": cookie})

    def reopen_logs(self) -> None:
        for handle in self._handles.values():
            if handle.channel is not None:
                handle.channel.send({"type": "reopen"})

    async def start(self, workers: int) -> None:
        """Start them; without a mesh they wait for one."""
        for number in range(workers):
            await self._start(number)
        spawn(self._look_after(), "look for workers that hang")

    async def _look_after(self) -> None:
        """Ticks are counted, not seconds: after a pause of the whole machine everybody is a little late."""
        while not self._stopping:
            await asyncio.sleep(1.0)
            for handle in self._handles.values():
                handle.silent += handle.spoken
                if handle.silent == HUNG_TICKS:
                    log.error("worker hangs, killing it number=%d pid=%d", handle.number, handle.process.pid)
                    handle.process.kill()

    async def _start(self, number: int) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-P", "-m", "meshbpf.runtime.worker", self._instance.name, str(theirs.fileno()),
            json.dumps(self._log_options),
            pass_fds=[theirs.fileno()],
            env={**os.environ, **MALLOC, "PYTHONPATH": str(BPF.parent)},  # -P: nothing of the working directory's
            start_new_session=True,  # a Ctrl-C is for the agent, which then drains us
        )  # fmt: skip
        theirs.close()
        about, told = None, -1
        while self._pack is not None and told != self._wanted:
            told = self._wanted
            about = await asyncio.to_thread(self._pack)
        handle = Handle(number, process, told=told, started=time.monotonic())
        handle.channel = Channel(ours, lambda message, fds: self._receive(handle, message, fds), lambda: None)
        self._handles[number] = handle
        if about is not None:
            handle.channel.send({"type": "mesh"}, blob=about)
            self._begin(handle)
        if self._stopping:
            handle.channel.send({"type": "drain", "seconds": 0.0})
        spawn(self._watch(handle), f"watch worker {number}")

    def _begin(self, handle: Handle) -> None:
        """The first mesh is sent: what it shall listen on comes after it."""
        if not handle.begun:
            handle.begun = True
            for served in self._served.values():
                self._send_listener(handle, served)

    def _send_listener(self, handle: Handle, served: Served) -> None:
        if handle.channel is not None and handle.begun:
            fds = [served.fd, *(sock.fileno() for sock in served.sockets)]
            handle.channel.send({"type": "listen", "netns": served.cookie}, fds)

    def _receive(self, handle: Handle, message: dict[str, Any], fds: list[int]) -> None:
        kind = message["type"]
        handle.silent, handle.spoken = 0, True
        if kind == "using":
            handle.generation = int(message["generation"])
            if message["trouble"] and message["trouble"] != handle.trouble:
                log.error("worker keeps its old setting pid=%d error=%s", handle.process.pid, message["trouble"])
            handle.trouble = message["trouble"]
            self._changed()
        elif kind == "refused":
            # Half of it may be in use by now: no word of an earlier mesh holds any more.
            handle.generation = handle.told = -1
            if message["generation"] == self._wanted:
                handle.refused = message["why"]
                self._changed()
        elif kind == "stats":
            self._report(f"{handle.number}-{handle.process.pid}", message["blob"].read())
        for fd in fds:
            os.close(fd)

    async def _watch(self, handle: Handle) -> None:
        code = await handle.process.wait()
        if handle.channel is not None:
            handle.channel.close()
        self._report(f"{handle.number}-{handle.process.pid}", None)
        if self._handles.get(handle.number) is handle:
            del self._handles[handle.number]
        self._changed()
        if self._stopping:
            return
        lived = time.monotonic() - handle.started
        deaths = 0 if lived > LIVED_SECONDS else self._deaths.get(handle.number, 0)
        self._deaths[handle.number] = deaths + 1
        delay = RESTART_SECONDS[min(deaths, len(RESTART_SECONDS) - 1)]
        self.restarts += 1
        log.warning(
            "worker died, restarting number=%d pid=%d code=%d delay=%.1fs",
            handle.number,
            handle.process.pid,
            code,
            delay,
        )
        await asyncio.sleep(delay)
        if not self._stopping:
            await self._start(handle.number)

    async def drain(self, seconds: float) -> None:
        """Ask every worker to finish; whoever has not after `seconds` and a little is killed."""
        self._stopping = True
        handles = list(self._handles.values())
        for handle in handles:
            if handle.channel is not None:
                handle.channel.send({"type": "drain", "seconds": seconds})
        if handles:
            waiting = [asyncio.ensure_future(handle.process.wait()) for handle in handles]
            _done, late = await asyncio.wait(waiting, timeout=seconds + 2.0)
            for handle, task in zip(handles, waiting, strict=True):
                if task in late:
                    log.warning("worker killed after the drain pid=%d", handle.process.pid)
                    handle.process.kill()
                    await task
