"""Ends connected UDP sockets whose endpoint has left its service, each in its own network namespace.

The kernel asks nobody about the datagrams of a connected socket, so it cannot be led elsewhere: its program has to
connect anew, and learns that by ECONNABORTED. Ended is only a socket that connect noted (its cookie is in
`connected`), that is still connected to the endpoint which it was given: never one that has no peer, that has another
one, or that is not in the mesh.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping

from loader import abi, libbpf
from loader.datagrams import stranded
from loader.sockdiag import SockDiag
from meshbpf.errors import MeshError
from meshbpf.runtime import listeners, netns

log = logging.getLogger("stranded")


def end(maps: Mapping[str, libbpf.Map]) -> int:
    """Sockets ended. What cannot be ended is logged and keeps its endpoint; nothing is raised for it."""
    rows = stranded(maps)
    if not rows:
        return 0
    ended = 0
    missing = {row.netns for row in rows.values()}
    for cookie, path in _namespaces({row.pid for row in rows.values()}):
        if cookie not in missing:
            continue
        if cookie:  # 0: this kernel cannot tell namespaces apart, so look into all of them
            missing.discard(cookie)
        try:
            ended += _end_in(path, rows)
        except (MeshError, OSError) as error:
            log.warning("connected UDP sockets keep an endpoint that is gone netns=%s error=%s", path, error)
        if not missing:
            break
    log.info("connected UDP sockets ended, their endpoint is gone count=%d of=%d", ended, len(rows))
    return ended


def _namespaces(pids: set[int]) -> Iterator[tuple[int, str]]:
    """(cookie, path) of those that the processes are in, then of all others: sockets are handed on."""
    seen = set()
    there = netns.living()
    for path in [*map(netns.of_process, pids), *there.values()]:
        fd = netns.opened(path)
        if fd is None:
            continue
        try:
            identity = netns.identity(fd)
        finally:
            os.close(fd)
        if identity in seen:
            continue
        seen.add(identity)
        cookie = listeners.cookie_of(path)
        if cookie is not None:
            yield cookie, path


def _end_in(path: str, rows: Mapping[int, abi.Connected]) -> int:
    fd = netns.opened(path)
    if fd is None:
        return 0
    try:
        with netns.inside(fd), SockDiag() as diag:
            found = [socket for socket in diag.connected() if socket.cookie in rows]
            return sum(diag.end(one) for one in found if _led(one.peer, one.port, rows[one.cookie]))
    finally:
        os.close(fd)


def _led(peer: bytes, port: bytes, row: abi.Connected) -> bool:
    return peer == bytes(row.given) and int.from_bytes(port, "big") == row.given_port
