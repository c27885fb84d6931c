"""A request is sent a second time only when the first time cannot have counted, and then where it has a chance."""

from __future__ import annotations

import asyncio
import select
import socket

import pytest

from meshbpf.model import ConnectionPool, ServicePolicy, TcpPool
from meshbpf.policy.balance import Balancer, Rnd
from tests.proxy.bed import NETNS, OK, Bed, Peer, plain, soon
from userspace_proxy.route import Target

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"
POST = b"POST /pay HTTP/1.1\r\nHost: a\r\ncontent-length: 3\r\n\r\nabc"


async def test_a_post_is_not_sent_again_because_of_a_reset(bed: Bed) -> None:
    """The endpoint acts and resets at once: nothing of the request may have been acknowledged by then."""
    paid = 0

    async def talk(peer: Peer) -> None:
        nonlocal paid
        while True:
            if b"POST" in await peer.head():
                await peer.read(3)
                paid += 1
                peer.reset()
                return
            peer.send(OK)

    await bed.serve(await bed.endpoint(talk))
    caller = await bed.caller()
    for _ in range(5):
        await caller.ask(GET)
    status, head, _body = await caller.ask(POST)
    assert (status, paid) == (503, 1) and b"x-meshbpf-reason: upstream_reset\r\n" in head


@pytest.mark.parametrize("hard", [False, True])
async def test_a_post_is_not_given_to_a_connection_that_is_dead_already(bed: Bed, hard: bool) -> None:
    """The endpoint has closed, or reset, and our loop has not read it yet."""
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    await caller.ask(GET)
    upstream = bed.route.targets[0].idle[NETNS][0]
    upstream.transport.pause_reading()  # stands for the moment in which the FIN or RST is there and not read
    if hard:
        endpoint.peers[0].reset()
    else:
        endpoint.peers[0].writer.transport.abort()
    await bed.settle(lambda: upstream.sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 1) != b"\x01")
    assert (await caller.ask(POST))[0] == 200
    assert plain(bytes(endpoint.received)).count(b"abc") == 1
    await bed.record()
    assert (await bed.record()).attempts == 1 and not upstream.alive


async def test_a_post_is_not_given_to_a_connection_on_which_something_waits_unasked(bed: Bed) -> None:
    endpoint = await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    await caller.ask(GET)
    upstream = bed.route.targets[0].idle[NETNS][0]
    upstream.transport.pause_reading()
    endpoint.peers[0].send(b"HTTP/1.1 408 Request Timeout\r\ncontent-length: 0\r\n\r\n")
    await bed.settle(lambda: bool(select.select([upstream.sock], [], [], 0)[0]))
    assert (await caller.ask(POST))[0] == 200
    assert len(endpoint.peers) == 2


async def test_when_an_endpoint_dies_its_requests_go_to_another_one(bed: Bed) -> None:
    """It dies with some of twenty requests under way; the other one answers none of them before it has them all."""
    count = 20
    gate, over, all_here = asyncio.Event(), asyncio.Event(), asyncio.Barrier(count)
    arrived: asyncio.Queue[Peer] = asyncio.Queue()

    async def mortal(peer: Peer) -> None:
        while True:
            await peer.head()
            if gate.is_set():
                arrived.put_nowait(peer)
                await over.wait()
                peer.reset()
                return
            peer.send(OK)

    async def other(peer: Peer) -> None:
        while True:
            await peer.head()
            if gate.is_set():
                arrived.put_nowait(peer)
                await all_here.wait()
            peer.send(OK)

    one = await bed.endpoint(mortal)
    await bed.serve(one, await bed.endpoint(other))
    callers = [await bed.caller() for _ in range(count)]
    for _ in range(4):
        for caller in callers:
            caller.send(GET)
        for caller in callers:
            await caller.answer()
    while not bed.records.empty():
        bed.records.get_nowait()
    gate.set()
    for caller in callers:
        caller.send(GET)
    for _ in callers:
        await soon(arrived.get())
    assert one._server is not None
    one._server.close()
    over.set()
    assert [(await caller.answer())[0] for caller in callers] == [200] * count
    records = [await bed.record() for _ in callers]
    assert any(record.attempts == 2 for record in records)
    assert all(record.upstream_host != f"127.0.0.1:{one.port}" for record in records)


class InOrder(Balancer[Target]):
    """The first that may be."""

    def pick(self, rnd: Rnd, exclude: Target | None = None) -> Target | None:
        return next((host for host in self.hosts if host is not exclude), None)


async def test_a_replay_does_not_use_up_the_attempts_of_a_connect(bed: Bed) -> None:
    """Dead pooled connection, then the endpoint chosen for the replay refuses: one more has to be tried."""
    served = 0

    async def once(peer: Peer) -> None:
        nonlocal served
        await peer.head()
        served += 1
        peer.send(OK)
        if served == 1:
            await peer.reader.read(2**16)
            peer.reset()
            return
        await peer.reader.read()

    endpoint, gone = await bed.endpoint(once), await bed.endpoint()
    await bed.serve(endpoint)
    caller = await bed.caller()
    await caller.ask(GET)
    await gone.close()
    bed.proxy.use(bed.mesh(endpoint, gone))
    bed.route.balancer = InOrder(bed.route.targets)
    assert (await caller.ask(GET))[0] == 200
    await bed.record()
    assert (await bed.record()).attempts == 3


async def test_a_replay_that_waits_for_a_place_gets_no_used_connection(bed: Bed) -> None:
    """What is released meanwhile may be as dead as the one before: it makes room for a new one."""
    gate = asyncio.Event()

    async def talk(peer: Peer) -> None:
        while True:
            head = await peer.head()
            if b"/mortal" in head and len(endpoint.peers) == 1:
                await gate.wait()
                peer.reset()
                return
            peer.send(OK)

    endpoint = await bed.endpoint(talk)
    await bed.serve(endpoint, policy=ServicePolicy(connection_pool=ConnectionPool(tcp=TcpPool(max_connections=1))))
    mortal, other = await bed.caller(), await bed.caller()
    await mortal.ask(GET)
    mortal.send(GET.replace(b"/ ", b"/mortal "))
    await bed.settle(lambda: bed.route.in_flight[0] == 1)
    other.send(GET)  # waits, and has the place when it becomes free
    await bed.settle(lambda: bed.route.pool.pending == 1)
    gate.set()
    assert (await other.answer())[0] == 200 and (await mortal.answer())[0] == 200
    assert len(endpoint.peers) == 3
