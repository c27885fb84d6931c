"""Services come, go and come back: a connection that stays open follows, and is counted once whatever carries it."""

from __future__ import annotations

from dataclasses import replace

from meshbpf.model import Endpoint as MeshEndpoint
from meshbpf.model import Mesh, Port, Protocol, Service
from tests.proxy.bed import ADDRESS, PORT, Bed, Peer, soon

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"


async def status(caller: Peer) -> int:
    return (await caller.ask(GET))[0]


async def test_a_kept_connection_is_served_again_when_its_service_comes_back(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    assert await status(caller) == 200
    mesh = bed.mesh(endpoint)
    for _ in range(2):
        bed.stats.adopt(Mesh(), 0.0)
        bed.proxy.use(Mesh())
        gone, head, _body = await caller.ask(GET)
        assert gone == 404 and b"x-meshbpf-reason: no_service\r\n" in head
        bed.stats.adopt(mesh, 0.0)
        bed.proxy.use(mesh)
        assert await status(caller) == 200
    await caller.close()
    await bed.settle(lambda: bed.proxy.open_connections == 0)
    assert bed.stats.snapshot(0.0)["connections_open"] == []


async def test_a_service_that_comes_back_while_nobody_asks_is_served(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    assert await status(caller) == 200
    mesh = bed.mesh(endpoint)
    bed.proxy.use(Mesh())
    bed.proxy.use(mesh)
    for _ in range(3):
        assert await status(caller) == 200


async def test_another_service_at_the_same_address_is_found(bed: Bed) -> None:
    one, other = await bed.endpoint(), await bed.endpoint()
    await bed.serve(one)
    caller = await bed.caller()
    assert await status(caller) == 200
    mesh = bed.mesh(other)
    bed.proxy.use(Mesh(services=(replace(mesh.services[0], name="payments"),)))
    assert await status(caller) == 200
    await bed.record()
    assert (await bed.record()).service == "payments"


async def test_a_connection_that_was_there_before_its_mesh_finds_its_service(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve()
    bed.proxy.use(Mesh())
    caller = await bed.caller()
    assert await status(caller) == 404
    bed.proxy.use(bed.mesh(endpoint))
    assert await status(caller) == 200


async def test_a_connection_that_was_there_before_its_mesh_may_be_relayed(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        assert await peer.read(6) == b"\x10\nraw\n"
        peer.send(b"\x00hello")
        peer.writer.close()

    endpoint = await bed.endpoint(talk)
    await bed.serve()
    bed.proxy.use(Mesh())
    caller = await bed.caller()
    await bed.settle(lambda: bed.proxy.open_connections == 1)
    bed.proxy.use(bed.mesh(endpoint, protocol=Protocol.TCP))
    caller.send(b"\x10\nraw\n")
    assert await caller.rest() == b"\x00hello"
    caller.end()
    assert (await bed.record()).protocol == "TCP"
    await bed.settle(lambda: bed.proxy.open_connections == 0)
    assert bed.stats.snapshot(0.0)["connections_open"] == []


async def test_a_relayed_connection_counts_once(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        await peer.reader.read()
        peer.writer.close()

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint, protocol=Protocol.TCP)
    caller = await bed.caller()
    await soon(endpoint.accepted.get())
    counted = bed.stats.snapshot(0.0)
    assert counted["connections_total"] == [["outbound", "shop.service", "orders", "proxy", 1]]
    assert counted["connections_open"] == [["orders", "proxy", 1]]
    caller.end()
    await caller.rest()
    await bed.record()
    assert bed.stats.snapshot(0.0)["connections_open"] == []


async def test_http2_counts_once(bed: Bed) -> None:
    async def talk(peer: Peer) -> None:
        await peer.reader.read()
        peer.writer.close()

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint)
    caller = await bed.caller()
    caller.send(PREFACE)
    await soon(endpoint.accepted.get())
    counted = bed.stats.snapshot(0.0)
    assert [row[-1] for row in counted["connections_total"]] == [1]
    assert [row[-1] for row in counted["connections_open"]] == [1]
    caller.end()
    await caller.rest()
    assert bed.proxy.open_connections == 0


async def test_two_ports_that_lead_to_one_share_no_connections(bed: Bed) -> None:
    """Each port has its own limits: a connection in the other one's pool would count in neither."""
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    service = Service(
        "orders",
        addresses=(ADDRESS,),
        ports=(Port("main", PORT, Protocol.HTTP), Port("alt", 8080, Protocol.HTTP)),
        endpoints=(MeshEndpoint("127.0.0.1", {"main": endpoint.port, "alt": endpoint.port}),),
    )
    bed.proxy.use(Mesh(services=(service,)))
    one, other = (bed.proxy.table.by_address[(ADDRESS, port)] for port in (PORT, 8080))
    assert one.targets[0] is not other.targets[0]
    assert await status(await bed.caller()) == 200
    assert bed.origin is not None
    bed.origin.port = 8080
    assert await status(await bed.caller()) == 200
    assert (one.pool.open, other.pool.open) == (1, 1)
    bed.origin.port = PORT
