"""What a worker serves with: the proxy, joined to the kernel's tables and to the callers' namespaces. Knows no agent.

All of it begins with the first mesh, which says where the tables are.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import random
import socket
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from loader.dataplane import Dataplane
from loader.environment import cgroup2
from loader.flows import Flows
from loader.instance import Instance
from loader.redirect import Redirector
from meshbpf.accesslog_format import wanted
from meshbpf.errors import ConfigError, DataplaneError, MeshError
from meshbpf.model import AccessLogPolicy, AccessLogSettings, Mesh
from meshbpf.record import Record
from meshbpf.runtime import netns
from meshbpf.runtime.workload import Workloads
from userspace_proxy.accesslog import AccessLog
from userspace_proxy.origin import Origin
from userspace_proxy.server import Proxy
from userspace_proxy.stats import Stats

log = logging.getLogger("worker")


class Serving:
    """Made inside the running loop, for the first mesh and what the agent said `about` it.

    Raises MeshError or OSError when the tables cannot be opened.
    """

    def __init__(self, instance: Instance, stats: Stats, mesh: Mesh, about: dict[str, Any]) -> None:
        self._loop = asyncio.get_running_loop()
        self._stats = stats
        self._dataplane = Dataplane(instance, about["layout"], mesh.agent.maps)
        self._flows = Flows(self._dataplane.maps["flows"].fd)
        self._workloads = Workloads(cgroup2(), [Path(path) for path in about["cgroups"]])
        self._cookie = int(about["cookie"])
        self._redirector: Redirector | None = None
        self._access_log: AccessLog | None = None
        self._log_settings = AccessLogSettings()
        self._sampling: dict[str, AccessLogPolicy] = {}
        self._namespaces: dict[int, int] = {}  # cookie → descriptor of the namespace
        self._listeners: dict[int, list[socket.socket]] = {}
        self._proxy = Proxy(
            lookup=self._origin,
            sink=self._sink,
            make_socket=self._make_socket,
            stats=stats,
            accelerator=None,
        )

    def use(self, mesh: Mesh, redirect: bool) -> str:
        """Serve `mesh` from now on; what of it cannot be followed although the rest is, or nothing.

        Raises ConfigError when the very first access log cannot be written.
        """
        trouble = self._log_to(mesh.agent.access_log)
        # Most services log everything: only those that sample are asked about.
        self._sampling = {
            service.label: policy.access_log
            for service in mesh.services
            if (policy := mesh.policy_for(service)).access_log.sample_percent < 100.0
        }
        self._stats.adopt(mesh, time.monotonic())
        self._redirect(redirect)
        self._proxy.use(mesh)
        return trouble

    def beat(self) -> None:
        """Tell connect hooks that the loop turns."""
        self._dataplane.beat(time.monotonic_ns())

    async def drain(self, seconds: float) -> tuple[int, int]:
        return await self._proxy.drain(seconds)

    # --- access log --------------------------------------------------------------------------------------------------

    def reopen_log(self) -> None:
        if self._access_log is not None:
            self._access_log.reopen()

    def close_log(self) -> None:
        if self._access_log is not None:
            self._access_log.close()

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
        self.close_log()
        self._access_log, self._log_settings = opened, settings
        return ""

    def _sink(self, record: Record) -> None:
        self._stats.record(record)
        assert self._access_log is not None
        policy = self._sampling.get(record.service) if self._sampling else None
        if policy is not None and not wanted(record, policy, random.random()):
            return
        self._access_log.write(record)

    # --- kernel ------------------------------------------------------------------------------------------------------

    def _origin(self, cookie: int, address: str, port: int) -> Origin | None:
        flow = self._flows(cookie, address, port)
        if flow is None:
            return None
        asked, asked_port, cgroup_id = flow
        return Origin(asked, asked_port, self._workloads(cgroup_id), cookie)

    def _redirect(self, wanted: bool) -> None:
        """New connections may join the redirect table, or may no longer; those inside stay until they leave."""
        if wanted and self._redirector is None:
            try:
                self._redirector = Redirector(self._dataplane.maps_folder, self._in_netns, self._cookie)
            except DataplaneError as error:
                log.warning("no redirect table here: all goes by TCP error=%s", error)
        self._proxy.accelerator = self._redirector if wanted else None

    # --- namespaces --------------------------------------------------------------------------------------------------

    def _in_netns(self, cookie: int) -> AbstractContextManager[None]:
        return netns.inside(self._namespaces[cookie])

    def _make_socket(self, cookie: int, family: int) -> socket.socket:
        """A socket in the caller's namespace, so that addresses and network policies stay the caller's.

        Raises OSError, as socket() does, also when the namespace is no longer served.
        """
        if cookie == self._cookie:
            return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        try:
            with self._in_netns(cookie):
                return socket.socket(family, socket.SOCK_STREAM | socket.SOCK_NONBLOCK)
        except (KeyError, MeshError) as error:
            raise OSError(errno.ENETDOWN, "the caller's network namespace is gone") from error

    def listen(self, cookie: int, fds: list[int]) -> None:
        """Serve a namespace: its descriptor, then those of its listeners; all are ours from now on."""
        namespace, *listeners = fds
        self.unlisten(cookie)
        self._namespaces[cookie] = namespace
        self._listeners[cookie] = [socket.socket(fileno=fd) for fd in listeners]
        for sock in self._listeners[cookie]:
            self._proxy.listen(cookie, sock)

    def unlisten(self, cookie: int) -> None:
        if cookie in self._listeners:
            self._proxy.unlisten(cookie)
            for sock in self._listeners.pop(cookie):
                sock.close()
            os.close(self._namespaces.pop(cookie))

    def listeners(self) -> Iterator[tuple[int, list[int]]]:
        """What `listen` was given and is still served: cookie, descriptors."""
        for cookie, sockets in self._listeners.items():
            yield cookie, [self._namespaces[cookie], *(sock.fileno() for sock in sockets)]

    def turn_deaf(self) -> None:
        """Accept no more. The namespaces stay: what is under way may still have to dial in them."""
        while self._listeners:
            cookie, sockets = self._listeners.popitem()
            self._proxy.unlisten(cookie)
            for sock in sockets:
                sock.close()
