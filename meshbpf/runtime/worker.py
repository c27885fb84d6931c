"""One proxy worker: `python -m meshbpf.runtime.worker INSTANCE FD`. Its life, and what it does at an agent's word.

It serves what the agent sends it (a mesh, listeners) and goes on serving the last of it when the agent is gone; the
next agent finds it by its socket in the run directory and takes the listeners over.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from typing import Any

import uvloop

from loader.instance import Instance
from meshbpf import garbage, logs
from meshbpf.model import Mesh
from meshbpf.runtime import netns
from meshbpf.runtime.about import Reader
from meshbpf.runtime.channel import Blob, Channel
from meshbpf.runtime.serving import Serving
from meshbpf.tasks import spawn
from userspace_proxy.stats import Stats

log = logging.getLogger("worker")
BEAT_SECONDS = 0.2  # five times within what the connect hook calls alive
STRAGGLE_SECONDS = 0.05  # between a connect hook that saw the proxy's port and the connection's handshake
REPORT_SECONDS = 1.0  # how much of the metrics a SIGKILL may cost


class Worker:
    def __init__(self, instance: Instance) -> None:
        self._instance = instance
        self._loop = asyncio.get_running_loop()
        self._channel: Channel | None = None
        self._serving: Serving | None = None  # from the first mesh on
        self._stats = Stats()
        self._done = asyncio.Event()
        self._draining = False
        self._drain_seconds = 0.0
        self._reader = Reader()
        self._unread: list[Blob] = []  # the newest whole mesh, and changes of it, oldest first
        self._following: asyncio.Task[None] | None = None

    async def run(self, first: socket.socket) -> None:
        """Serve until drained. `first` is our end of the agent's channel."""
        path = self._instance.run / f"worker-{os.getpid()}.sock"
        path.unlink(missing_ok=True)  # of somebody long dead who had our id
        door = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        door.bind(str(path))
        path.chmod(0o600)
        door.listen(4)
        door.setblocking(False)
        self._loop.add_reader(door.fileno(), self._take_agent, door)
        for number in (signal.SIGTERM, signal.SIGINT):
            self._loop.add_signal_handler(number, self._told_to_end)
        self._channel = Channel(first, self._receive, self._agent_gone)
        self._channel.send({"type": "hello", "pid": os.getpid()})
        await self._done.wait()
        self._loop.remove_reader(door.fileno())
        door.close()
        path.unlink(missing_ok=True)
        self._report()
        if self._serving is not None:
            self._serving.close_log()

    def _take_agent(self, door: socket.socket) -> None:
        """A new agent knocks: it is the one we talk to from now on."""
        with contextlib.suppress(BlockingIOError):
            sock, _address = door.accept()
            if self._channel is not None:
                self._channel.close()
            self._channel = Channel(sock, self._receive, self._agent_gone)
            self._channel.send({"type": "hello", "pid": os.getpid()})

    def _told_to_end(self) -> None:
        """A signal: who stops a whole unit signals us too, but then the agent decides when, and drains us."""
        if self._channel is None:
            self._drain(self._drain_seconds)

    def _agent_gone(self) -> None:
        self._channel = None
        if self._serving is None:
            self._done.set()  # nothing was given to us to serve
        else:
            log.info("the agent is gone: serving the last mesh pid=%d", os.getpid())

    def _receive(self, message: dict[str, Any], fds: list[int]) -> None:
        kind = message["type"]
        if kind == "mesh":
            if not message.get("change"):
                self._unread.clear()
            self._unread.append(message["blob"])
            if self._serving is None:  # nobody waits yet, and what comes next builds on it
                about = self._unread.pop().read()
                with self._refusing(about), garbage.paused():
                    self._use(self._reader.mesh(about), about)
            elif self._following is None or self._following.done():
                self._following = spawn(self._follow(), "follow")
        elif kind == "foretell":
            about = message["blob"].read()
            with self._refusing(about), garbage.paused():
                self._reader.mesh(about)
        elif kind == "handover":
            self._hand_over()
        elif kind == "drain":
            self._drain(float(message["seconds"]))
        elif self._serving is not None:
            self._serve(self._serving, kind, message, fds)
        else:  # the first mesh was refused: there is nothing to serve with
            for fd in fds:
                os.close(fd)

    def _serve(self, serving: Serving, kind: str, message: dict[str, Any], fds: list[int]) -> None:
        if kind == "listen":
            serving.listen(cookie := int(message["netns"]), fds)
            self._say({"type": "listening", "netns": cookie})
        elif kind == "unlisten":
            serving.unlisten(int(message["netns"]))
        elif kind == "reopen":
            serving.reopen_log()

    async def _follow(self) -> None:
        """Read the newest mesh in a thread, since a large one takes longer than callers may wait; then use it."""
        while self._unread:
            about = await asyncio.to_thread(self._unread.pop(0).read)
            with self._refusing(about):
                self._use(await asyncio.to_thread(self._reader.mesh, about), about)

    @contextlib.contextmanager
    def _refusing(self, about: dict[str, Any]) -> Iterator[None]:
        """Say why a mesh cannot be followed: the agent then keeps the last good one everywhere, and tells it again.

        Any error: whatever it is, half the workers on another mesh than the kernel is worse.
        """
        try:
            yield
        except Exception as error:
            log.exception("the mesh is refused pid=%d", os.getpid())
            why = f"{type(error).__name__}: {error}"
            self._say({"type": "refused", "generation": int(about["generation"]), "why": why})

    def _say(self, message: dict[str, Any]) -> None:
        if self._channel is not None:
            self._channel.send(message)

    def _use(self, mesh: Mesh, about: dict[str, Any]) -> None:
        if self._serving is None:
            self._serving = Serving(self._instance, self._stats, mesh, about)
            self._beat()
            self._report_later()
        trouble = self._serving.use(mesh, bool(about["redirect"]))
        self._drain_seconds = mesh.agent.proxy.drain
        self._say({"type": "using", "generation": mesh.generation, "trouble": trouble})

    def _hand_over(self) -> None:
        """Give the listeners to the agent that asks, one message per namespace, then say that is all."""
        assert self._channel is not None
        for cookie, fds in self._serving.listeners() if self._serving is not None else ():
            self._channel.send({"type": "listener", "netns": cookie}, fds)
        self._channel.send({"type": "handed over"})

    def _drain(self, seconds: float) -> None:
        """Serve what was led here before the agent took the port back, then accept no more and finish."""
        if self._draining:
            return
        self._draining = True
        spawn(self._finish(seconds), "drain")

    async def _finish(self, seconds: float) -> None:
        try:
            await asyncio.sleep(STRAGGLE_SECONDS)
            if self._serving is not None:
                self._serving.turn_deaf()
            self._say({"type": "deaf"})
            if self._serving is not None:
                ended, cut = await self._serving.drain(seconds)
                log.info("drained pid=%d ended=%d cut=%d bound_seconds=%.1f", os.getpid(), ended, cut, seconds)
        finally:
            self._done.set()

    def _beat(self) -> None:
        """Say that the loop turns. A worker that drains no longer vouches for new connections."""
        if not self._draining and self._serving is not None:
            self._serving.beat()
            self._loop.call_later(BEAT_SECONDS, self._beat)

    def _report(self) -> None:
        if self._channel is not None:
            self._channel.send({"type": "stats", "pid": os.getpid()}, blob=self._stats.snapshot(time.monotonic()))

    def _report_later(self) -> None:
        self._report()
        self._loop.call_later(REPORT_SECONDS, self._report_later)


def main() -> None:
    name, fd, options = sys.argv[1], int(sys.argv[2]), json.loads(sys.argv[3])
    # Who signals a whole process group means the agent, which tells us what there is to do.
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    logs.configure(options["log_level"], options["log_format"])
    first = socket.socket(fileno=fd)
    netns.Own.fd()

    garbage.rarely()

    async def serve() -> None:
        await Worker(Instance(name)).run(first)

    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        runner.run(serve())


if __name__ == "__main__":
    main()
