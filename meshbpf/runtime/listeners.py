"""The proxy's listening sockets, one pair (127.0.0.1, [::1]) in every namespace served. Held by the agent, used by all
workers, so that a killed worker takes no waiting connection with it.
"""

from __future__ import annotations

import errno
import logging
import os
import socket
from dataclasses import dataclass, field

from loader import dataplane
from meshbpf.errors import Busy, MeshError
from meshbpf.runtime import netns, ports

log = logging.getLogger("listeners")
BACKLOG = 4096


@dataclass(slots=True)
class Served:
    """One namespace with our listeners in it. `cookie` is how the kernel programs name it."""

    identity: tuple[int, int]
    fd: int
    cookie: int
    sockets: list[socket.socket] = field(default_factory=list)
    missed: int = 0  # scans in a row that found nobody in it

    def close(self) -> None:
        for sock in self.sockets:
            sock.close()
        os.close(self.fd)


def _listen(family: int, address: str, port: int) -> socket.socket:
    sock = socket.socket(family, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((address, port))
        sock.listen(BACKLOG)
        # No Fast Open, even where net.ipv4.tcp_fastopen gives it to every listener: a connection could be accepted with
        # its first packet, before the caller's side is established and `flows` says where it was going.
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 0)
        sock.setblocking(False)
    except OSError:
        sock.close()
        raise
    return sock


def cookie_of(path: str) -> int | None:
    """How the kernel programs name the namespace at `path`; None when it is gone or may not be entered."""
    fd = netns.opened(path)
    if fd is None:
        return None
    try:
        with netns.inside(fd), socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
            return dataplane.netns_cookie(probe)
    except (OSError, MeshError):
        return None
    finally:
        os.close(fd)


def serve(fd: int, port: int) -> Served:
    """Open our listeners in the namespace `fd` (which becomes ours to close); connect knows them when they are marked
    (`Dataplane.mark`). Raises Busy when the port is taken."""
    served = Served(netns.identity(fd), fd, 0)
    try:
        with netns.inside(fd):
            served.sockets.append(_listen(socket.AF_INET, "127.0.0.1", port))
            try:
                served.sockets.append(_listen(socket.AF_INET6, "::1", port))
            except OSError as error:
                if error.errno == errno.EADDRINUSE:
                    raise
                log.info("no IPv6 listener netns=%d error=%s", served.identity[1], error.strerror)
            served.cookie = dataplane.netns_cookie(served.sockets[0])
    except OSError as error:
        why = f"cannot be listened on: {error.strerror}"
        if error.errno == errno.EADDRINUSE:
            with netns.inside(fd):
                why = f"is taken by {ports.owner(port)}"
        served.close()
        where, remedy = f"network namespace {served.identity[1]}", "end it, or change Agent.spec.proxy.listen"
        raise Busy(f"proxy port {port} {why} ({where}): {remedy}") from error
    except MeshError:
        served.close()
        raise
    return served
