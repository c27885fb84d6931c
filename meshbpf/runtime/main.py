"""What `meshbpf run` does, in order: lock, read, attach, serve, follow, drain. The composition root."""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import signal
from collections.abc import Sequence
from pathlib import Path

from aiohttp import web

from loader import dataplane
from meshbpf import garbage
from meshbpf.model import Agent as AgentSettings
from meshbpf.model import Mesh
from meshbpf.registry.embedded import EmbeddedSource
from meshbpf.registry.file import FileSource
from meshbpf.registry.instance import Rules
from meshbpf.runtime import api, notify
from meshbpf.runtime.agent import Agent, Options
from meshbpf.runtime.metrics import Metrics
from meshbpf.runtime.sources import Sources, embedded_settings, last_generation, new_store_undone, registries
from meshbpf.schema import addresses
from meshbpf.tasks import spawn
from userspace_proxy import accesslog


def own_ports(mesh: Mesh) -> frozenset[int]:
    """Ports of ours that no instance may name as its own: it would lead callers into the mesh itself."""
    return frozenset(port for _field, _host, port in addresses.listeners(mesh.agent))


async def serve(
    options: Options, paths: Sequence[Path], texts: list[tuple[str, str]], compiler: dataplane.Compiler
) -> None:
    """Until SIGTERM or SIGINT. A configuration that is bad at the start is an error; later ones keep the last good.

    `texts` are what the files of `paths` say now; whoever calls does not look for garbage yet.
    """
    # Before anything that takes time: unhandled, the signal would end us. What is read below is new anyway.
    asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, lambda: None)
    source = FileSource(paths)
    said = source.first(texts)
    configured = Mesh(said.agent or AgentSettings(), said.services)
    dataplane.foresee(compiler, configured.agent.maps)
    accesslog.check(configured.agent.access_log)
    async with contextlib.AsyncExitStack() as ending:
        ending.enter_context(options.instance.lock())
        rules = Rules(
            own_ports=own_ports(configured),
            service_networks=(ipaddress.ip_network(configured.agent.address_pool),),
            service_addresses=frozenset(a for service in configured.services for a in service.addresses),
        )
        settings = embedded_settings(configured, options.instance.name)
        ending.enter_context(new_store_undone(options.instance, Path(settings.store)))
        embedded = EmbeddedSource(settings, rules)
        ending.push_async_callback(embedded.close)
        await embedded.start()
        generation = last_generation(options.instance)
        sources = Sources(source, embedded, registries(configured.agent, embedded), generation)
        watchers = sources.start()
        mesh = await sources.first()
        agent = Agent(options, mesh, compiler)
        agent.need(*watchers)
        metrics = Metrics(agent, sources)
        runners: list[web.AppRunner] = []
        try:
            await agent.listen()
            runners.append(await metrics.serve())
            await agent.attach()
            reads = {"/v1/status": metrics.status, "/v1/counts": metrics.counts}
            runners.append(await api.serve(options.instance.socket, reads, embedded.registrar))
            await agent.start()
            garbage.rarely(first=False)

            def reread() -> None:
                sources.files.reload()
                agent.supervisor.reopen_logs()

            asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, reread)
            follower = spawn(agent.following.follow(sources.meshes(mesh)), "follow sources")
            agent.need(follower)
            notify.tell(notify.READY)
            await agent.run()
            follower.cancel()
        finally:
            notify.tell(notify.STOPPING)
            await agent.close()
            for runner in runners:
                await runner.cleanup()
            options.instance.socket.unlink(missing_ok=True)
