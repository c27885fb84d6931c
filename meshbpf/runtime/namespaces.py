"""Which namespaces are served: one more when a caller shows up in it, one less when its last process is gone."""

from __future__ import annotations

import logging
import os
import socket
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from loader import environment
from meshbpf.errors import MeshError
from meshbpf.runtime import listeners, netns
from meshbpf.runtime.listeners import Served

log = logging.getLogger("namespaces")
REFUSED_SECONDS = 1.0  # a namespace that could not be served is tried again at most this often
EMPTY_SCANS = 2  # scans in a row that must find nobody, so that a fork between two reads is not mistaken for an end


class Namespaces:
    """Keeps `served` by kernel cookie; tells `added` and `removed`, who pass the listeners on to the workers."""

    def __init__(
        self, cgroups: Sequence[Path], port: int, added: Callable[[Served], None], removed: Callable[[int], None]
    ) -> None:
        self._cgroups = cgroups
        self._port = port
        self._added = added
        self._removed = removed
        self.home = netns.identity(netns.Own.fd())
        self.served: dict[int, Served] = {}
        self.refused: dict[tuple[int, int], tuple[str, float]] = {}  # why, and when it was tried last

    def adopt(self, cookie: int, fds: Sequence[int]) -> None:
        """Take over a namespace with listening sockets from a worker that outlived its agent."""
        namespace, *rest = fds
        served = Served(netns.identity(namespace), namespace, cookie, [socket.socket(fileno=fd) for fd in rest])
        if cookie in self.served or not rest or served.sockets[0].getsockname()[1] != self._port:
            served.close()
            return
        self.served[cookie] = served

    def start(self) -> None:
        """Serve our own namespace and every one that is in use. Raises Busy when our own port is taken."""
        if not any(served.identity == self.home for served in self.served.values()):
            self._keep(listeners.serve(os.dup(netns.Own.fd()), self._port))
        for pid in netns.in_use(self._cgroups).values():
            self.serve_process(pid)

    def serve_process(self, pid: int) -> None:
        """Serve the namespace of a process. A refusal is logged once and tried again with the next call, but not more
        often than every REFUSED_SECONDS: callers may come by the thousand."""
        fd = netns.of_process(pid)
        if fd is None:
            return
        identity = netns.identity(fd)
        refusal, tried = self.refused.get(identity, ("", -REFUSED_SECONDS))
        if (
            any(served.identity == identity for served in self.served.values())
            or time.monotonic() - tried < REFUSED_SECONDS
        ):
            os.close(fd)
            return
        if not environment.has_netns_cookies():
            os.close(fd)
            return  # the connect hook counts netns_unsupported
        try:
            served = listeners.serve(fd, self._port)
        except MeshError as error:
            if refusal != str(error):
                log.error("namespace not served netns=%d pid=%d error=%s", identity[1], pid, error)
            self.refused[identity] = (str(error), time.monotonic())
            return
        self.refused.pop(identity, None)
        self._keep(served)
        log.info("serving namespace netns=%d cookie=%d pid=%d", identity[1], served.cookie, pid)

    def _keep(self, served: Served) -> None:
        self.served[served.cookie] = served
        self._added(served)

    def scan(self) -> None:
        """Serve namespaces that came into use, and let go of those whose last process is gone."""
        found = netns.in_use(self._cgroups)
        for pid in found.values():
            self.serve_process(pid)
        for cookie, served in list(self.served.items()):
            served.missed = 0 if served.identity in found or served.identity == self.home else served.missed + 1
            if served.missed >= EMPTY_SCANS:
                log.info("namespace left netns=%d cookie=%d", served.identity[1], cookie)
                del self.served[cookie]
                self._removed(cookie)
                served.close()
        for identity in [identity for identity in self.refused if identity not in found]:
            del self.refused[identity]

    def close(self) -> None:
        for served in self.served.values():
            served.close()
        self.served.clear()
