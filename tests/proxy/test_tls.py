"""`tls` ports: the name is read, the endpoint picked behind it, and every byte passed on as it came."""

from __future__ import annotations

import asyncio
import hashlib
import os
import socket

import pytest

from meshbpf.model import Protocol
from meshbpf.policy.balance import Balancer
from meshbpf.reason import Reason
from meshbpf.record import Record
from tests.proxy.bed import Bed, Endpoint, Peer, soon
from tests.proxy.test_hello import NAME, PLAIN, POSTGRESQL, SSLV2, extension, message, openssl, records, sni
from userspace_proxy.hello import LIMIT
from userspace_proxy.relays import relays_of
from userspace_proxy.route import Route, Target
from userspace_proxy.tcp import Relay, State

ONE_READ = 256 * 1024
ANSWER = b"\x16\3\3 what a server says"


async def echo(peer: Peer) -> None:
    """Answers to the first bytes, and says all that came when the caller has ended."""
    first = await peer.reader.read(2**18)
    peer.send(ANSWER)
    rest = await peer.reader.read()
    peer.send(first + rest)
    peer.writer.close()


async def serve(bed: Bed, *endpoints: Endpoint | int) -> None:
    await bed.serve(*(endpoints or (await bed.endpoint(echo),)), protocol=Protocol.TLS)


def relays() -> list[Relay]:
    return list(relays_of(asyncio.get_running_loop())._relays)


async def greeting(bed: Bed, received: int) -> Relay:
    """The one relay, once it has read this much of a hello."""
    await bed.settle(lambda: any(relay.down.received == received for relay in relays()))
    (relay,) = relays()
    assert relay.state is State.GREETING
    return relay


def told(record: Record) -> tuple[str | None, str | None, str | None]:
    return record.requested_server_name, record.reason, record.response_flags


async def test_the_name_is_read_and_every_byte_passed_on(bed: Bed) -> None:
    await serve(bed)
    caller = await bed.caller()
    caller.send(openssl() + b"early data")
    assert await caller.read(len(ANSWER)) == ANSWER
    caller.send(b"more")
    caller.end()
    assert await caller.rest() == openssl() + b"early data" + b"more"
    record = await bed.record()
    assert told(record) == (NAME, None, None)
    assert (record.protocol, record.attempts, record.endpoint_outcome) == ("TCP", 1, "ok")
    assert record.bytes_received == len(openssl()) + 14


async def test_the_endpoint_is_picked_when_the_name_is_known(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    """The place where a TLSRoute will choose is asked once the hello is whole, and its choice is obeyed."""
    one, two = await bed.endpoint(echo), await bed.endpoint(echo)
    await serve(bed, one, two)
    asked: list[str | None] = []

    def chosen(route: Route, server_name: str | None) -> Balancer[Target]:
        asked.append(server_name)
        wanted = one if server_name == NAME else two
        only = [target for target in route.targets if target.port == wanted.port]
        return type(route.balancer)(only)

    monkeypatch.setattr(Route, "balancer_for", chosen)
    hello = openssl()
    for name, expected in ((NAME, one), ("else." + NAME, two), (NAME, one)):
        caller = await bed.caller()
        data = hello if name == NAME else openssl(name=name)
        caller.send(data[:-1])
        await greeting(bed, len(data) - 1)
        assert not asked and all(target.active == 0 for target in bed.route.targets)
        caller.send(data[-1:])
        await soon(expected.accepted.get())
        assert asked == [name]
        asked.clear()
        caller.end()
        assert await caller.rest() == ANSWER + data
        assert told(await bed.record()) == (name, None, None)


async def test_byte_by_byte_and_record_by_record(bed: Bed) -> None:
    await serve(bed)
    hello = records(message(sni(NAME.encode())), *range(0, 60, 3))
    caller = await bed.caller()
    caller.writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    for at in range(len(hello) - 1):
        caller.send(hello[at : at + 1])
        await greeting(bed, at + 1)
    caller.send(hello[-1:])
    assert await caller.read(len(ANSWER)) == ANSWER
    caller.end()
    assert await caller.rest() == hello
    assert told(await bed.record()) == (NAME, None, None)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        (openssl(name=None), "sni_missing"), (PLAIN, "not_tls"), (SSLV2, "not_tls"), (POSTGRESQL, "not_tls"),
        (records(message(sni(b"a b"))), "not_tls"),
        (records(message(extension(b"\x3a\x3a", bytes(LIMIT)), sni(b"a")), LIMIT), "hello_too_large"),
    ],
)  # fmt: skip
async def test_without_a_name_it_is_passed_on_and_counted(bed: Bed, said: bytes, reason: str) -> None:
    await serve(bed)
    caller = await bed.caller()
    caller.send(said)
    assert await caller.read(len(ANSWER)) == ANSWER
    caller.end()
    assert await caller.rest() == said
    record = await bed.record()
    assert told(record) == (None, reason, None)
    bed.stats.record(record)
    assert ["orders", reason, 1] in bed.stats.snapshot(0.0)["proxy_verdicts_total"]


@pytest.mark.parametrize("said", [b"", openssl()[:-1]])
async def test_an_end_instead_of_a_hello_is_passed_on(bed: Bed, said: bytes) -> None:
    await serve(bed)
    caller = await bed.caller()
    caller.send(said)
    await greeting(bed, len(said))
    caller.end()
    assert await caller.rest() == ANSWER + said
    assert told(await bed.record()) == (None, "hello_cut", None)


async def test_a_reset_instead_of_a_hello_dials_nobody(bed: Bed) -> None:
    endpoint = await bed.endpoint(echo)
    await serve(bed, endpoint)
    caller = await bed.caller()
    caller.send(openssl()[:-1])
    await greeting(bed, len(openssl()) - 1)
    caller.reset()
    record = await bed.record()
    assert told(record) == (None, "downstream_closed", "DC")
    assert record.attempts == 0 and endpoint.accepted.empty()


@pytest.mark.parametrize("said", [b"", openssl()[:-1]])
async def test_a_caller_that_never_greets_is_closed(bed: Bed, said: bytes) -> None:
    """15 s behind its coming, whether it drips or says nothing: by FIN where nothing is lost."""
    endpoint = await bed.endpoint(echo)
    await serve(bed, endpoint)
    caller = await bed.caller()
    came = asyncio.get_running_loop().time()
    caller.send(said[:1])
    await greeting(bed, len(said[:1]))
    sweep = relays_of(asyncio.get_running_loop()).tick
    sweep(came + 14.9)
    caller.send(said[1:])
    await greeting(bed, len(said))
    sweep(came + 16)
    if said:
        with pytest.raises(ConnectionResetError):
            await caller.rest()
    else:
        assert await caller.rest() == b""
    record = await bed.record()
    assert told(record) == (None, "hello_timeout", None)
    assert record.attempts == 0 and endpoint.accepted.empty()


async def test_a_hello_in_time_is_not_held_against_a_quiet_connection(bed: Bed) -> None:
    await serve(bed)
    caller = await bed.caller()
    caller.send(openssl())
    assert await caller.read(len(ANSWER)) == ANSWER
    sweep = relays_of(asyncio.get_running_loop()).tick
    now = asyncio.get_running_loop().time()
    sweep(now)
    sweep(now + 3000)
    caller.end()
    assert await caller.rest() == openssl()
    assert told(await bed.record()) == (NAME, None, None)


async def test_an_endpoint_that_refuses_is_the_reason_then(bed: Bed) -> None:
    with socket.socket() as dead:
        dead.bind(("127.0.0.1", 0))
        await serve(bed, dead.getsockname()[1])
        for said, name in ((openssl(), NAME), (PLAIN, None)):
            caller = await bed.caller()
            caller.send(said)
            with pytest.raises(ConnectionResetError):
                await caller.rest()
            record = await bed.record()
            assert told(record) == (name, "connect_failed", "UF")
            assert record.attempts == 1


async def test_what_follows_the_hello_is_not_read_while_dialling(bed: Bed) -> None:
    with socket.socket() as deaf, socket.socket() as fill:
        deaf.bind(("127.0.0.1", 0))
        deaf.listen(0)
        fill.connect(deaf.getsockname())  # the backlog is full: further SYNs are dropped
        await serve(bed, deaf.getsockname()[1])
        caller = await bed.caller()
        caller.send(openssl()[:-1])
        relay = await greeting(bed, len(openssl()) - 1)
        caller.send(openssl()[-1:] + bytes(32 << 20))
        await bed.settle(lambda: relay.dialling and not relay.down.transport.is_reading())  # type: ignore[union-attr]
        assert relay.down.received <= LIMIT + ONE_READ
        relay.close(Reason.DRAINING)
        assert told(await bed.record()) == (NAME, "draining", None)


@pytest.mark.parametrize(
    ("said", "name", "reason"),
    [(openssl(), NAME, "upstream_reset"), (openssl(name=None), None, "upstream_reset"), (PLAIN, None, "not_tls")],
)
async def test_an_endpoint_that_resets(bed: Bed, said: bytes, name: str | None, reason: str) -> None:
    """What is no TLS it resets with reason, and that is the caller's fault."""

    async def resetting(peer: Peer) -> None:
        await peer.reader.read(100)
        peer.reset()

    await serve(bed, await bed.endpoint(resetting))
    caller = await bed.caller()
    caller.send(said)
    with pytest.raises(ConnectionResetError):
        await caller.rest()
    record = await bed.record()
    assert told(record) == (name, reason, "UC")
    assert record.endpoint_outcome == "upstream_reset"


async def test_a_hello_and_much_more_waits_in_bounded_memory(bed: Bed) -> None:
    """While the endpoint does not read."""
    gate = asyncio.Event()
    digest = hashlib.sha256()

    async def stuck(peer: Peer) -> None:
        await gate.wait()
        while data := await peer.reader.read(2**18):
            digest.update(data)
        peer.send(digest.digest())
        peer.writer.close()

    await serve(bed, await bed.endpoint(stuck))
    caller = await bed.caller()
    sent = openssl() + os.urandom(32 << 20)
    caller.send(sent[: len(openssl()) - 1])
    relay = await greeting(bed, len(openssl()) - 1)
    caller.send(sent[len(openssl()) - 1 :])
    await bed.settle(lambda: relay.state is State.RELAYING and not relay.down.transport.is_reading())  # type: ignore[union-attr]
    assert relay.up.transport is not None
    assert relay.up.transport.get_write_buffer_size() <= LIMIT + 2 * ONE_READ
    assert relay.down.received < 16 << 20
    gate.set()
    caller.end()
    assert await caller.rest() == hashlib.sha256(sent).digest()
    assert told(await bed.record()) == (NAME, None, None)


async def test_a_drain_ends_a_caller_that_has_not_greeted(bed: Bed) -> None:
    await serve(bed)
    caller = await bed.caller()
    await greeting(bed, 0)
    await bed.proxy.drain(0.0)
    assert await caller.rest() == b""
    assert told(await bed.record()) == (None, "draining", None)


async def test_a_tcp_port_reads_no_names(bed: Bed) -> None:
    """And its endpoint may speak first."""

    async def first(peer: Peer) -> None:
        peer.send(ANSWER)
        await peer.reader.read()
        peer.writer.close()

    await bed.serve(await bed.endpoint(first), protocol=Protocol.TCP)
    caller = await bed.caller()
    assert await caller.read(len(ANSWER)) == ANSWER
    caller.send(openssl())
    caller.end()
    assert await caller.rest() == b""
    assert told(await bed.record()) == (None, None, None)
