"""One proxy worker: `python -m meshbpf.runtime.worker INSTANCE FD`. Joins the data path to the kernel's tables.

It serves what the agent sends it (a mesh, listeners) and goes on serving the last of it when the agent is gone; the
next agent finds it by its socket in the run directory and takes the listeners over.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import logging
import os
import random
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import uvloop

from loader.dataplane import Dataplane
from loader.environment import cgroup2
from loader.flows import Flows
from loader.instance import Instance
from loader.redirect import Redirector
from meshbpf import garbage, logs
from meshbpf.accesslog_format import wanted
from meshbpf.errors import ConfigError, DataplaneError, MeshError
from meshbpf.model import AccessLogPolicy, AccessLogSettings, Mesh
from meshbpf.record import Record
from meshbpf.runtime import netns
from meshbpf.runtime.about import Reader
from meshbpf.runtime.channel import Blob, Channel
from meshbpf.runtime.workload import Workloads
from meshbpf.tasks import spawn
from userspace_proxy.accesslog import AccessLog
from userspace_proxy.origin import Origin
from userspace_proxy.server import Proxy
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
        self._dataplane: Dataplane | None = None
        self._flows: Flows | None = None
        self._redirector: Redirector | None = None
        self._proxy: Proxy | None = None
        self._access_log: AccessLog | None = None
        self._log_settings = AccessLogSettings()
        self._sampling: dict[str, AccessLogPolicy] = {}
        self._stats = Stats()
        self._workloads = Workloads(cgroup2(), ())
        self._namespaces: dict[int, int] = {}  # cookie → descriptor of the namespace
        self._listeners: dict[int, list[socket.socket]] = {}
        self._cookie = 0
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
        if self._access_log is not None:
            self._access_log.close()

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
        if self._dataplane is None:
            self._done.set()  # nothing was given to us to serve
        else:
            log.info("the agent is gone: serving the last mesh pid=%d", os.getpid())

    def _receive(self, message: dict[str, Any], fds: list[int]) -> None:
        kind = message["type"]
        if kind == "mesh":
            if not message.get("change"):
                self._unread.clear()
            self._unread.append(message["blob"])
            if self._proxy is None:  # nobody waits yet, and what comes next builds on it
                about = self._unread.pop().read()
                with self._refusing(about), garbage.paused():
                    self._use(self._reader.mesh(about), about)
            elif self._following is None or self._following.done():
                self._following = spawn(self._follow(), "follow")
        elif kind == "listen":
            self._listen(int(message["netns"]), fds)
        elif kind == "unlisten":
            self._unlisten(int(message["netns"]))
        elif kind == "handover":
            self._hand_over()
        elif kind == "drain":
            self._drain(float(message["seconds"]))
        elif kind == "reopen" and self._access_log is not None:
            self._access_log.reopen()

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
        if self._proxy is None:
            plane = Dataplane(self._instance, about["layout"], mesh.agent.maps)
            self._flows = Flows(plane.maps["flows"].fd)
            self._workloads = Workloads(cgroup2(), [Path(path) for path in about["cgroups"]])
            self._cookie = int(about["cookie"])
            self._dataplane = plane
            self._proxy = Proxy(
                lookup=self._origin,
                sink=self._sink,
                make_socket=self._make_socket,
                stats=self._stats,
                accelerator=None,
            )
            self._beat()
            self._report_later()
        trouble = self._log_to(mesh.agent.access_log)
        # Most services log everything: only those that sample are asked about.
        self._sampling = {
            service.label: policy.access_log
            for service in mesh.services
            if (policy := mesh.policy_for(service)).access_log.sample_percent < 100.0
        }
        self._stats.adopt(mesh, time.monotonic())
        self._redirect(bool(about["redirect"]))
        self._proxy.use(mesh)
        self._drain_seconds = mesh.agent.proxy.drain
        self._say({"type": "using", "generation": mesh.generation, "trouble": trouble})

    def _log_to(self, settings: AccessLogSettings) -> str:
        """Write the access log as `settings` say; why not, when that cannot be: then the log before goes on."""
        if self._access_log is not None and self._log_settings == settings:
            return ""
        try:
            opened = AccessLog(settings, self._loop, self._stats.lost)
        except ConfigError as error:
            if self._access_log is None:
                raise
            return str(error)
        if self._access_log is not None:
            self._access_log.close()
        self._access_log, self._log_settings = opened, settings
        return ""

    def _redirect(self, wanted: bool) -> None:
        """New connections may join the redirect table, or may no longer; those inside stay until they leave."""
        assert self._proxy is not None and self._dataplane is not None
        if wanted and self._redirector is None:
            try:
                self._redirector = Redirector(self._dataplane.maps_folder, self._in_netns, self._cookie)
            except DataplaneError as error:
                log.warning("no redirect table here: all goes by TCP error=%s", error)
        self._proxy.accelerator = self._redirector if wanted else None

    def _in_netns(self, cookie: int) -> AbstractContextManager[None]:
        return netns.inside(self._namespaces[cookie])

    def _sink(self, record: Record) -> None:
        self._stats.record(record)
        assert self._access_log is not None
        policy = self._sampling.get(record.service) if self._sampling else None
        if policy is not None and not wanted(record, policy, random.random()):
            return
        self._access_log.write(record)

    def _origin(self, cookie: int, address: str, port: int) -> Origin | None:
        assert self._flows is not None
        flow = self._flows(cookie, address, port)
        if flow is None:
            return None
        asked, asked_port, cgroup_id = flow
        return Origin(asked, asked_port, self._workloads(cgroup_id), cookie)

    def _make_socket(self, cookie: int, family: int) -> socket.socket:
        """A socket in the caller's namespace, so that addresses and network policies stay the caller's.

        Raises OSError, as socket() does, also when the namespace is no longer served.
        """
        if cookie == self._cookie:
            return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with netns.inside(self._namespaces[cookie]):
                return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except (KeyError, MeshError) as error:
            raise OSError(errno.ENETDOWN, "the caller's network namespace is gone") from error

    def _listen(self, cookie: int, fds: list[int]) -> None:
        namespace, *listeners = fds
        self._unlisten(cookie)
        self._namespaces[cookie] = namespace
        self._listeners[cookie] = [socket.socket(fileno=fd) for fd in listeners]
        assert self._proxy is not None
        for sock in self._listeners[cookie]:
            self._proxy.listen(cookie, sock)
        if self._channel is not None:
            self._channel.send({"type": "listening", "netns": cookie})

    def _unlisten(self, cookie: int) -> None:
        if cookie in self._listeners:
            assert self._proxy is not None
            self._proxy.unlisten(cookie)
            for sock in self._listeners.pop(cookie):
                sock.close()
            os.close(self._namespaces.pop(cookie))

    def _hand_over(self) -> None:
        """Give the listeners to the agent that asks, one message per namespace, then say that is all."""
        assert self._channel is not None
        for cookie, sockets in self._listeners.items():
            fds = [self._namespaces[cookie], *(sock.fileno() for sock in sockets)]
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
            while self._listeners:  # not the namespaces: what is under way may still have to dial in them
                cookie, sockets = self._listeners.popitem()
                if self._proxy is not None:
                    self._proxy.unlisten(cookie)
                for sock in sockets:
                    sock.close()
            if self._channel is not None:
                self._channel.send({"type": "deaf"})
            if self._proxy is not None:
                await self._proxy.drain(seconds)
        finally:
            self._done.set()

    def _beat(self) -> None:
        """Say that the loop turns. A worker that drains no longer vouches for new connections."""
        if not self._draining and self._dataplane is not None:
            self._dataplane.beat(time.monotonic_ns())
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
