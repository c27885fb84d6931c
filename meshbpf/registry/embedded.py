"""The embedded registry as a source of services: what its instances say, as whole snapshots; and its TCP listener.

The listener accepts writes over TCP, so off loopback it needs a token. `listen: ""` means no listener; the agent's unix
socket has the same routes.
"""

from __future__ import annotations

import asyncio
import errno
import ipaddress
from collections.abc import AsyncIterator
from dataclasses import replace

from aiohttp import web

from meshbpf.errors import Busy, ConfigError, MeshError
from meshbpf.model import EmbeddedRegistry, Service
from meshbpf.registry import api
from meshbpf.registry.base import Snapshot, read_token
from meshbpf.registry.instance import Rules, ServiceId
from meshbpf.registry.leases import Leases
from meshbpf.registry.registrar import Registrar
from meshbpf.registry.services import service_of
from meshbpf.registry.store import Store

COALESCE = 0.02  # seconds between snapshots: a deployment registers many instances at once, and each costs a merge
SOURCE = "registry"


Known = dict[ServiceId, tuple[int, Service]]


def services_of(leases: Leases, known: Known | None = None) -> tuple[Service, ...]:
    """Every service that has instances, sorted by (namespace, name); endpoints sorted by instance id. `known` are those
    of the last time with their generations: one that did not change since stays the same object.
    """
    found: Known = {}
    for identity in leases.services():
        generation = leases.generation_of(identity)
        last = known.get(identity) if known is not None else None
        if last is None or last[0] != generation:
            instances = [lease.instance for lease in leases.of(identity)]
            last = (generation, service_of(identity, instances, SOURCE))
        found[identity] = last
    if known is not None:
        known.clear()
        known.update(found)
    return tuple([service for _generation, service in found.values()])


class EmbeddedSource:
    """`registrar` is for the unix socket's routes and the address pool; `start` may be called before `watch`."""

    name = SOURCE

    def __init__(self, settings: EmbeddedRegistry, rules: Rules = Rules()) -> None:  # noqa: B008  frozen
        self.settings = settings
        # Whoever writes through the unix socket may always use loopback addresses.
        rules = replace(rules, allow_loopback=settings.allow_loopback)
        self.registrar = Registrar(Store(settings.store), rules)
        self.address: tuple[str, int] | None = None  # where it listens, port 0 resolved
        self._runner: web.AppRunner | None = None
        self._starting = asyncio.Lock()
        self._started = False

    async def start(self) -> None:
        """Open the store, then listen. Raises Busy for a taken port, ConfigError for a listener that needs a token."""
        async with self._starting:
            if self._started:
                return
            listener = _listener(self.settings)
            await self.registrar.start()
            self._started = True
            if listener is None:
                return
            host, port, token = listener
            app = api.application(self.registrar, host, token)
            # Cancelled handlers: a reader who hung up must not keep its place among the waiters.
            runner = web.AppRunner(app, access_log=None, handler_cancellation=True, shutdown_timeout=1.0)
            await runner.setup()
            self._runner = runner
            try:
                await web.TCPSite(runner, host, port).start()
            except OSError as error:
                await self._stop()
                where = f"registry: cannot listen on {self.settings.listen} (Agent.spec.registries[].embedded.listen)"
                if error.errno == errno.EADDRINUSE:
                    raise Busy(f"{where}: the port is taken: end who listens there, or change it") from error
                raise MeshError(f"{where}: {error.strerror or error}") from error
            bound = runner.addresses[0]
            self.address = (bound[0], bound[1])

    async def close(self) -> None:
        async with self._starting:
            await self._stop()

    async def _stop(self) -> None:
        if not self._started:
            return
        self._started = False
        # Nobody new, then the registrar, which lets the waiting readers go, then the connections they had.
        for site in list(self._runner.sites) if self._runner is not None else ():
            await site.stop()
        await self.registrar.close()
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None

    async def watch(self) -> AsyncIterator[Snapshot]:
        await self.start()
        news, clock = self.registrar.news, asyncio.get_running_loop().time
        known: Known = {}
        try:
            while True:
                news.clear()
                next_at = clock() + COALESCE
                services = services_of(self.registrar.leases, known)
                yield Snapshot(services, error=self.registrar.problem, source=self.name)
                await news.wait()
                await asyncio.sleep(max(0.0, next_at - clock()))
        finally:
            await self.close()


def _listener(settings: EmbeddedRegistry) -> tuple[str, int, str] | None:
    """Host, port and token; None for no listener."""
    if not settings.listen:
        return None
    host, _, port = settings.listen.rpartition(":")
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError("Agent.spec.registries.embedded.listen", f'"{settings.listen}" is not HOST:PORT')
    token = read_token("Agent.spec.registries.embedded.tokenFile", settings.token_file)
    if not token and not _is_loopback(host):
        raise ConfigError(
            "Agent.spec.registries.embedded.tokenFile", f"is needed to listen on {host}, which others can reach"
        )
    return host, int(port), token


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
