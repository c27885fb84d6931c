"""The agent's unix socket (0600): the read API of the CLI, and the registry's routes. Everything that changes the
dataplane comes through here or through the watched files.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

from aiohttp import web

from meshbpf.registry import api as registry_api
from meshbpf.registry.registrar import Registrar


async def serve(path: Path, status: Callable[[], dict[str, Any]], registrar: Registrar) -> web.AppRunner:
    """Listen on `path`. The caller cleans the returned runner up."""
    app = web.Application(middlewares=registry_api.middlewares())

    async def get_status(_request: web.Request) -> web.Response:
        return web.json_response(status())

    app.add_routes([web.get("/v1/status", get_status), *registry_api.routes(registrar, local=True)])
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
