"""Which namespaces are served: one more when a caller shows up in it, one less when nobody but us keeps it alive."""

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
EMPTY_SCANS = 2  # scans in a row that must find nobody: reading /proc is no snapshot


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
        self._searched: dict[int, float] = {}  # cookie → when
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
        if missing := environment.missing_to_serve():
            log.warning("callers in other network namespaces are not governed missing=%s", ",".join(missing))
        for pid in netns.in_use(self._cgroups).values():
            self._serve(netns.of_process(pid))

    def serve_caller(self, pid: int, cookie: int) -> None:
        """Serve the namespace of a process whose call found no listener. It may have ended by now, refused: then the
        namespace is searched for, so that whoever tries again is served."""
        if cookie in self.served or self._serve(netns.of_process(pid)):
            return
        now = time.monotonic()
        if now - self._searched.get(cookie, -REFUSED_SECONDS) < REFUSED_SECONDS:
            return
        self._searched = {known: at for known, at in self._searched.items() if now - at < REFUSED_SECONDS}
        self._searched[cookie] = now
        for identity, path in netns.living().items():
            if not self._is_served(identity) and listeners.cookie_of(path) == cookie:
                self._serve(path)
                return

    def _is_served(self, identity: tuple[int, int]) -> bool:
        return any(served.identity == identity for served in self.served.values())

    def _serve(self, path: str) -> bool:
        """Serve the namespace at `path`; False when it is not there. A refusal is logged once and tried again with the
        next call, but not more often than every REFUSED_SECONDS: callers may come by the thousand."""
        fd = netns.opened(path)
        if fd is None:
            return False
        identity = netns.identity(fd)
        refusal, tried = self.refused.get(identity, ("", -REFUSED_SECONDS))
        if self._is_served(identity) or time.monotonic() - tried < REFUSED_SECONDS:
            os.close(fd)
            return True
        if not environment.has_netns_cookies():
            os.close(fd)
            return True  # the connect hook counts netns_unsupported
        try:
            served = listeners.serve(fd, self._port)
        except MeshError as error:
            if refusal != str(error):
                log.error("namespace not served netns=%d path=%s error=%s", identity[1], path, error)
            self.refused[identity] = (str(error), time.monotonic())
            return True
        self.refused.pop(identity, None)
        self._keep(served)
        log.info("serving namespace netns=%d cookie=%d path=%s", identity[1], served.cookie, path)
        return True

    def _keep(self, served: Served) -> None:
        self.served[served.cookie] = served
        self._added(served)

    def scan(self) -> None:
        """Serve namespaces that came into use, and let go of those that only we keep alive."""
        for pid in netns.in_use(self._cgroups).values():
            self._serve(netns.of_process(pid))
        found = netns.living()
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
