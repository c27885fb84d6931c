"""sessionAffinity: the endpoint that a client had last, for as long as it is one, and not for ever."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loader import abi
from meshbpf.model import EndpointState, LoadBalancer, Mesh, Mode, Service, SessionAffinity
from meshbpf.runtime import netns as runtime_netns
from tests.support import datagrams, netns
from tests.support.datagrams import Server
from tests.support.ground import Ground, Listener, mesh, reached, service

ADDRESS, OTHER = "127.96.8.1", "127.96.8.2"
SECONDS = 7.5


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    runtime_netns.Own.fd()  # where the tests begin, before one of them enters another namespace
    with Ground(f"affinity-{os.getpid()}") as made:
        made.attach(sticky())
        yield made


def sticky(*services: Service) -> Mesh:
    made = mesh(*services, mode=Mode.DIRECT)
    balance = LoadBalancer(session_affinity=SessionAffinity.CLIENT_IP, session_affinity_timeout=SECONDS)
    return replace(made, policies={key: replace(p, load_balancer=balance) for key, p in made.policies.items()})


def call(ground: Ground, listeners: list[Listener], source: str = "", address: str = ADDRESS) -> Listener:
    with ground.client() as sock:
        if source:
            sock.bind((source, 0))
        sock.connect((address, 80))
        return reached(*listeners)


def pass_time(ground: Ground, seconds: float) -> None:
    """For every client: its last connection was that much earlier than it was."""
    table = ground.plane.maps["affinities"]
    for key, value in list(table.items()):
        affinity = abi.Affinity.from_buffer_copy(value)
        affinity.used -= round(seconds * 1e9)
        table.update(key, bytes(affinity))


def test_a_client_comes_back_to_its_endpoint(ground: Ground, listeners: list[Listener]) -> None:
    ground.plane.apply(sticky(service("orders", ADDRESS, *(a.endpoint() for a in listeners))))
    clients = ["", *(f"127.1.0.{n}" for n in range(1, 8))]
    first = {source: call(ground, listeners, source) for source in clients}
    assert {*first.values()} == {*listeners}
    for again in (clients[::-1], clients[3:], clients[::2]):  # not as the round goes
        assert [call(ground, listeners, source) for source in again] == [first[source] for source in again]


def test_services_are_apart_and_so_are_namespaces(ground: Ground) -> None:
    with netns.fresh():
        several = [Listener(f"127.0.0.{n}", 1001) for n in (1, 2)]
        ends = [listener.endpoint() for listener in several]
        ground.plane.apply(sticky(service("one", ADDRESS, *ends), service("two", OTHER, *ends[::-1])))
        one = call(ground, several)
        assert {call(ground, several, address=OTHER) for _ in range(3)} == {*several} - {one}
        assert call(ground, several) is one
        for listener in several:
            listener.close()
    with netns.fresh():
        here = [Listener(f"127.0.0.{n}", 1001) for n in (1, 2)]
        assert call(ground, here).address != one.address  # the next of the round, not what the other namespace has
        for listener in here:
            listener.close()


def test_the_time_runs_from_the_last_connection(ground: Ground, listeners: list[Listener]) -> None:
    ground.plane.apply(sticky(service("orders", ADDRESS, *(a.endpoint() for a in listeners))))
    first = call(ground, listeners)
    for _ in range(3):
        pass_time(ground, SECONDS - 5)
        assert call(ground, listeners) is first
    pass_time(ground, SECONDS)
    second = call(ground, listeners)
    assert second is listeners[(listeners.index(first) + 1) % len(listeners)]
    assert call(ground, listeners) is second


@pytest.mark.parametrize("how", ["gone", "draining", "weightless"])
def test_an_endpoint_that_takes_no_more_is_left(ground: Ground, listeners: list[Listener], how: str) -> None:
    ends = [a.endpoint() for a in listeners]
    ground.plane.apply(sticky(service("orders", ADDRESS, *ends), service("others", OTHER, *ends)))
    first = call(ground, listeners)
    which = listeners.index(first)
    state, weight = {"draining": (EndpointState.DRAINING, 100)}.get(how, (EndpointState.READY, 0))
    changed = [replace(end, state=state, weight=weight) if i == which else end for i, end in enumerate(ends)]
    if how == "gone":
        del changed[which]
    # Of the other service it is as good as ever: the endpoint's own row does not say that it drains.
    ground.plane.apply(sticky(service("orders", ADDRESS, *changed), service("others", OTHER, *ends)))
    second = call(ground, listeners)
    assert second is not first
    ground.plane.apply(sticky(service("orders", ADDRESS, *ends), service("others", OTHER, *ends)))
    assert {call(ground, listeners) for _ in range(3)} == {second}


def test_who_does_not_ask_for_it_is_not_noted(ground: Ground, listeners: list[Listener]) -> None:
    ground.plane.apply(mesh(service("orders", ADDRESS, *(a.endpoint() for a in listeners))))
    before = dict(ground.plane.maps["affinities"].items())
    assert {call(ground, listeners) for _ in listeners} == {*listeners}
    assert dict(ground.plane.maps["affinities"].items()) == before


def test_a_client_of_both_families_never_gets_what_it_cannot_reach(ground: Ground) -> None:
    with netns.fresh(), Listener("::1") as six, Listener("127.0.0.1") as four:
        ground.plane.apply(sticky(service("orders", (ADDRESS, "fd00:96::8"), six.endpoint(), four.endpoint())))
        for _ in range(4):
            pass_time(ground, SECONDS)
            with ground.connect("fd00:96::8"):
                any_of = reached(six, four)
            assert call(ground, [six, four]) is four
            with ground.connect("fd00:96::8"):
                assert reached(six, four) is four, f"after {any_of.address}"


def test_udp(ground: Ground) -> None:
    """A new socket goes where the client's last one went; a retry goes elsewhere, and the client with it."""
    servers = [Server(f"127.0.0.{n}") for n in (1, 2, 3)]
    ground.plane.apply(sticky(datagrams.service("dns", ADDRESS, *(server.endpoint() for server in servers))))
    first = ask(ground, servers)
    for connected in (True, False):
        assert ask(ground, servers, connected) is first
    with datagrams.client(ground) as sock:
        assert send(sock, servers) is first
        datagrams.pass_a_second(ground)
        second = send(sock, servers)
        assert second is not first
    assert ask(ground, servers) is second
    for server in servers:
        server.close()


def ask(ground: Ground, servers: list[Server], connected: bool = False) -> Server:
    with datagrams.client(ground) as sock:
        if not connected:
            return send(sock, servers)
        sock.connect((ADDRESS, 53))
        sock.send(b"question")
        return datagrams.asked(*servers)


def send(sock: socket.socket, servers: list[Server]) -> Server:
    sock.sendto(b"question", (ADDRESS, 53))
    return datagrams.asked(*servers)
