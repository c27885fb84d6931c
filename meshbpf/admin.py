"""The admin listener: GET /metrics, /healthz, /readyz on loopback, and nothing that changes anything.

It runs in the agent, never on the proxy's loop. What is told comes from injected callables. A page in somebody's
browser must not read it by DNS rebinding, so the Host header has to name loopback or the configured host itself.
"""

from __future__ import annotations

import asyncio
import ipaddress
from collections.abc import Awaitable, Callable

from aiohttp import web

from meshbpf.errors import Busy, ConfigError

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]
Metrics = Callable[[str], Awaitable[tuple[bytes, str]]]
Readiness = Callable[[], str | None]


def is_local(host: str, configured: str) -> bool:
    """Does the Host header's value `host` name this listener and not a foreign name that resolves to it?"""
    name = host.strip().lower()
    if name.startswith("["):
        name, _, port = name[1:].partition("]")
        port = port.removeprefix(":")
    else:
        name, _, port = name.partition(":")
    if port and not (port.isascii() and port.isdigit()):
        return False
    if name in ("localhost", configured.lower()):
        return True
    try:
        # Listening on every address, any of them may be named: a number is no name that somebody could rebind.
        return ipaddress.ip_address(name).is_loopback or configured in ("0.0.0.0", "::")
    except ValueError:
        return False


def application(host: str, metrics: Metrics, not_ready: Readiness) -> web.Application:
    """`metrics` is given the Accept header and gives page and content type; `not_ready` gives why not, or None."""

    @web.middleware
    async def guard(request: web.Request, handler: Handler) -> web.StreamResponse:
        if not is_local(request.headers.get("Host", ""), host):
            raise web.HTTPMisdirectedRequest(text="Host must be this listener's address\n")
        return await handler(request)

    async def show_metrics(request: web.Request) -> web.Response:
        page, content_type = await metrics(request.headers.get("Accept", ""))
        return web.Response(body=page, headers={"Content-Type": content_type})

    async def healthz(_: web.Request) -> web.Response:
        return web.Response(text="ok\n")

    async def readyz(_: web.Request) -> web.Response:
        why = not_ready()
        return web.Response(text="ready\n") if why is None else web.Response(status=503, text=f"not ready: {why}\n")

    app = web.Application(middlewares=[guard])
    app.router.add_get("/metrics", show_metrics)
    app.router.add_get("/healthz", healthz)
    app.router.add_get("/readyz", readyz)
    return app


async def serve(listen: str, metrics: Metrics, not_ready: Readiness) -> web.AppRunner:
    """Listen on `listen` (HOST:PORT); `cleanup()` of what is given back ends it. Busy when the port is taken."""
    host, _, port = listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit():
        raise ConfigError("Agent.spec.admin.listen", f"{listen!r} is not HOST:PORT")
    runner = web.AppRunner(
        application(host, metrics, not_ready), access_log=None, handle_signals=False, shutdown_timeout=1.0
    )
    await runner.setup()
    site = web.TCPSite(runner, host, int(port))
    try:
        await site.start()
    except OSError as error:
        await runner.cleanup()
        raise Busy(f"cannot listen on {listen} (Agent.spec.admin.listen): {error.strerror}") from error
    except asyncio.CancelledError:
        await runner.cleanup()
        raise
    return runner
