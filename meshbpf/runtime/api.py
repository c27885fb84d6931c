"""The agent's unix socket (0600): the read API of the CLI, and the registry's routes. Everything that changes the
dataplane comes through here or through the watched files.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path
from typing import Any

from aiohttp import web

from meshbpf.registry import api as registry_api
from meshbpf.registry.registrar import Registrar


def _told(tell: Callable[[], dict[str, Any]]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def answer(_request: web.Request) -> web.Response:
        return web.json_response(tell())

    return answer


async def serve(path: Path, reads: Mapping[str, Callable[[], dict[str, Any]]], registrar: Registrar) -> web.AppRunner:
    """Listen on `path`; a GET of each of `reads` is answered with what it tells. The caller cleans the returned runner
    up.
    """
    app = web.Application(middlewares=registry_api.middlewares())
    told = [web.get(where, _told(tell)) for where, tell in reads.items()]
    app.add_routes([*told, *registry_api.routes(registrar, local=True)])
    runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
    await runner.setup()
    path.unlink(missing_ok=True)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    old = os.umask(0o177)  # never a moment in which somebody else could connect
    try:
        sock.bind(str(path))
    finally:
        os.umask(old)
    await web.SockSite(runner, sock).start()
    return runner
