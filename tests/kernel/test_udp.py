"""UDP in the direct carrier: whom a socket talks to, who seems to answer, and what its application is told."""

from __future__ import annotations

import contextlib
import errno
import os
import select
import socket
import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from loader import abi, dataplane
from loader.sockdiag import SockDiag
from meshbpf.errors import DataplaneError
from meshbpf.model import EndpointState, Port, Protocol, Service
from meshbpf.runtime import netns as runtime_netns
from meshbpf.runtime import stranded
from tests.support import netns
from tests.support.datagrams import Server, asked, client, pass_a_second, reasons, service
from tests.support.ground import SIZES, Ground, Listener, mesh, reached

ADDRESS, OTHER, SIX = "127.96.53.1", "127.96.53.2", "fd00:96::53"
DNS, HERE = (ADDRESS, 53), "127.0.0.1"


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    runtime_netns.Own.fd()  # where the tests begin, before one of them enters another namespace
    with Ground(f"udp-{os.getpid()}") as made:
        yield made


@pytest.fixture
def servers() -> Iterator[list[Server]]:
    made = [Server(f"127.0.0.{n}") for n in (1, 2, 3)]
    yield made
    for server in made:
        server.close()


def counts(ground: Ground, address: str = ADDRESS) -> tuple[int, int]:
    """Sockets that were connected, and that are no more."""
    key = bytes(abi.ServiceKey(abi.pack_address(address), 53, 17))
    raw = ground.plane.maps["services"].lookup(key)
    assert raw is not None
    opened, _, closed, _ = ground.plane.connections()[int.from_bytes(raw, "little")]
    return opened, closed


# --- connected -------------------------------------------------------------------------------------------------------


def test_a_connected_socket(ground: Ground, servers: list[Server]) -> None:
    a = servers[0]
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint())))
    opened, closed = counts(ground)
    with client(ground) as sock:
        sock.connect(DNS)
        sock.send(b"question")
        a.answer()
        assert sock.recvfrom(100) == (b"answer to question", DNS)
        assert sock.getpeername() == DNS
        sock.sendto(b"to the peer", DNS)  # an address, although it is connected
        a.answer()
        assert sock.recv(100) == b"answer to to the peer"
        assert counts(ground) == (opened + 1, closed)
    assert counts(ground) == (opened + 1, closed + 1)


def test_connected_sockets_go_round(ground: Ground, servers: list[Server]) -> None:
    a, b, c = servers
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint(3), b.endpoint(2), c.endpoint(1))))
    found = []
    for _ in range(12):
        with client(ground) as sock:
            sock.connect(DNS)
            for _again in range(2):
                sock.send(b"question")
                found.append(asked(*servers))
    assert [found.count(server) for server in servers] == [12, 8, 4]
    assert found[::2] == found[1::2]


def test_tcp_and_udp_of_one_number_are_apart(ground: Ground, servers: list[Server]) -> None:
    with Listener() as listener:
        both = replace(
            service(
                "dns", ADDRESS, replace(servers[0].endpoint(), ports={"main": servers[0].port, "tcp": listener.port})
            ),
            ports=(Port("main", 53, Protocol.UDP), Port("tcp", 53, Protocol.TCP)),
        )
        ground.attach(mesh(both))
        with client(ground) as sock, ground.connect(ADDRESS, 53):
            assert reached(listener) is listener
            sock.connect(DNS)
            sock.send(b"question")
            assert asked(servers[0])
            assert sock.getpeername() == DNS


def test_what_is_no_udp_service_is_untouched(ground: Ground, servers: list[Server]) -> None:
    a, b, _ = servers
    tcp = Service("web", addresses=(OTHER,), ports=(Port("main", 53),), endpoints=(a.endpoint(),))
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint()), tcp))
    before = ground.plane.counters()
    with client(ground) as sock, Server(OTHER, 53) as alone:
        for target in (b, alone):
            sock.sendto(b"sent to", (target.address, target.port))
            target.answer()
            assert sock.recvfrom(100) == (b"answer to sent to", (target.address, target.port))
            sock.connect((target.address, target.port))
            sock.send(b"connected")
            target.answer()
            assert sock.recvfrom(100) == (b"answer to connected", (target.address, target.port))
            assert sock.getpeername() == (target.address, target.port)
            disconnect(sock)
    assert ground.plane.counters() == before


def disconnect(sock: socket.socket) -> None:
    import ctypes
    import struct

    libc = ctypes.CDLL(None, use_errno=True)
    assert libc.connect(sock.fileno(), struct.pack("H14x", socket.AF_UNSPEC), 16) == 0


def test_connected_again(ground: Ground, servers: list[Server]) -> None:
    """To another service, and to what is none: each time the old talk has ended, and the peer's name is the new one."""
    a, b, c = servers
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint()), service("more", OTHER, b.endpoint())))
    first, second = counts(ground), counts(ground, OTHER)
    with client(ground) as sock:
        sock.connect(DNS)
        sock.connect((OTHER, 53))
        assert sock.getpeername() == (OTHER, 53)
        assert counts(ground) == (first[0] + 1, first[1] + 1)
        assert counts(ground, OTHER) == (second[0] + 1, second[1])
        sock.connect((c.address, c.port))
        assert sock.getpeername() == (c.address, c.port)
        assert counts(ground, OTHER) == (second[0] + 1, second[1] + 1)
        sock.send(b"question")
        c.answer()
        assert sock.recvfrom(100)[1] == (c.address, c.port)
    assert counts(ground, OTHER) == (second[0] + 1, second[1] + 1)


def test_led_by_two_cgroups_at_once(servers: list[Server]) -> None:
    """The hooks run twice; the second time they see the endpoint."""
    a = servers[0]
    with Ground(f"udp-twice-{os.getpid()}") as ground:
        child = ground.child("child")
        ground.attach(mesh(service("dns", ADDRESS, a.endpoint())), ground.cgroup, child)
        with ground.client(cgroup=child, kind=socket.SOCK_DGRAM) as sock:
            sock.connect(DNS)
            assert counts(ground) == (1, 0)
            sock.sendto(b"question", DNS)
            a.answer()
            assert sock.recvfrom(100) == (b"answer to question", DNS)
        assert counts(ground) == (1, 1)


def test_a_full_table_of_connected_sockets(servers: list[Server]) -> None:
    a = servers[0]
    with Ground(f"udp-full-{os.getpid()}") as ground:
        ground.attach(mesh(service("dns", ADDRESS, a.endpoint()), sizes=replace(SIZES, datagrams=4)))
        socks = [client(ground) for _ in range(6)]
        for sock in socks:
            sock.connect(DNS)
            sock.send(b"question")
            a.answer()
            assert sock.recvfrom(100) == (b"answer to question", DNS)
        assert reasons(ground, "connect")["datagrams_full"] == 2
        for sock in socks:
            sock.close()
        assert counts(ground) == (4, 4)
        assert not list(ground.plane.maps["connected"].keys())


# --- unconnected -----------------------------------------------------------------------------------------------------


def ask(sock: socket.socket, *servers: Server, answered: bool = True, to: tuple[str, int] = DNS) -> Server:
    """One question by sendto; which server got it. Its answer must come from where it was sent to."""
    sock.sendto(b"question", to)
    (found,) = select.select(servers, [], [], 10)[0]
    assert isinstance(found, Server)
    if answered:
        found.answer()
        assert sock.recvfrom(100) == (b"answer to question", to)
    else:
        found.take()
    return found


def test_answers_come_from_the_service(ground: Ground, servers: list[Server]) -> None:
    """With a stranger's datagram among them, which keeps its own address."""
    a, b, _ = servers
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint()), service("more", OTHER, b.endpoint())))
    with client(ground) as sock, Server() as stranger:
        assert ask(sock, a) is a
        assert ask(sock, b, to=(OTHER, 53)) is b
        stranger.socket.sendto(b"hello", (HERE, sock.getsockname()[1]))
        assert sock.recvfrom(100) == (b"hello", (stranger.address, stranger.port))
        data, _, _, source = sock.recvmsg(100) if a.socket.sendto(b"more", (HERE, sock.getsockname()[1])) else ()
        assert (data, source) == (b"more", DNS)


def test_a_conversation_stays_and_sockets_go_round(ground: Ground, servers: list[Server]) -> None:
    ground.attach(mesh(service("dns", ADDRESS, *(server.endpoint() for server in servers))))
    found = []
    for _ in range(6):
        with client(ground) as sock:
            talk = [ask(sock, *servers, answered=turn % 2 == 0) for turn in range(6)]
            assert len(set(talk)) == 1
            found.append(talk[0])
    assert sorted(found.count(server) for server in servers) == [2, 2, 2]


def test_a_retry_reaches_another_endpoint(ground: Ground, servers: list[Server]) -> None:
    a, b, _ = servers
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint(), b.endpoint())))
    before = reasons(ground, "sendmsg").get("unanswered", 0)
    with client(ground) as sock:
        silent = ask(sock, a, b, answered=False)
        assert ask(sock, a, b, answered=False) is silent  # at once: it is one conversation (A and AAAA)
        pass_a_second(ground)
        with client(ground) as neighbour:  # now it would be the silent one's turn
            assert ask(neighbour, a, b) is not silent
        assert ask(sock, a, b, answered=False) is not silent
        pass_a_second(ground)
        assert ask(sock, a, b) is silent
    assert reasons(ground, "sendmsg")["unanswered"] == before + 2


def test_an_endpoint_that_has_answered_is_forgiven(ground: Ground, servers: list[Server]) -> None:
    a, b, _ = servers
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint(), b.endpoint())))
    with client(ground) as sock:
        first = ask(sock, a, b)
        for _ in range(2):
            assert ask(sock, a, b, answered=False) is first  # answered until now: nobody waits
            for _again in range(abi.PATIENCE):
                pass_a_second(ground)
                assert ask(sock, a, b, answered=_again < abi.PATIENCE - 1) is first
                if _again < abi.PATIENCE - 1:
                    assert ask(sock, a, b, answered=False) is first
            assert ask(sock, a, b) is first
        assert ask(sock, a, b, answered=False) is first
        for _ in range(abi.PATIENCE):
            pass_a_second(ground)
            assert ask(sock, a, b, answered=False) is first
        pass_a_second(ground)
        assert ask(sock, a, b, answered=False) is not first


def test_the_only_endpoint_is_asked_again(ground: Ground, servers: list[Server]) -> None:
    a = servers[0]
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint())))
    with client(ground) as sock:
        ask(sock, a, answered=False)
        pass_a_second(ground)
        assert ask(sock, a) is a


def test_a_conversation_outlives_other_endpoints(ground: Ground, servers: list[Server]) -> None:
    """Endpoints that come and go beside it, and its own draining, are no reason to leave it."""
    a, b, c = servers
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint())))
    with client(ground) as sock:
        assert ask(sock, a) is a
        ground.attach(mesh(service("dns", ADDRESS, c.endpoint(), b.endpoint(), a.endpoint())))
        assert [ask(sock, *servers) for _ in range(4)] == [a] * 4
        ground.attach(mesh(service("dns", ADDRESS, b.endpoint(), a.endpoint(state=EndpointState.DRAINING))))
        assert ask(sock, *servers) is a
        with client(ground) as fresh:
            assert ask(fresh, *servers) is b


def test_an_endpoint_that_left_gets_nothing_more(ground: Ground, servers: list[Server]) -> None:
    """Also when it serves another service: one may not go on with what the other still has."""
    a, b, _ = servers
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint()), service("more", OTHER, a.endpoint())))
    with client(ground) as sock:
        assert ask(sock, a) is a
        assert ask(sock, a, to=(OTHER, 53)) is a
        ground.attach(mesh(service("dns", ADDRESS, b.endpoint()), service("more", OTHER, a.endpoint())))
        before = reasons(ground, "sendmsg").get("endpoint_gone", 0)
        assert ask(sock, a, b) is b
        assert ask(sock, a, b, to=(OTHER, 53)) is a
        assert reasons(ground, "sendmsg")["endpoint_gone"] == before + 1


def test_many_sockets_and_few_places(servers: list[Server]) -> None:
    """The kernel throws the oldest conversations out: they begin anew, and every question is answered."""
    with Ground(f"udp-lru-{os.getpid()}") as ground:
        ground.attach(
            mesh(service("dns", ADDRESS, *(server.endpoint() for server in servers)), sizes=replace(SIZES, datagrams=8))
        )
        socks = [client(ground) for _ in range(64)]
        for _ in range(3):
            for sock in socks:
                ask(sock, *servers)
        for sock in socks:
            sock.close()


# --- nobody ----------------------------------------------------------------------------------------------------------


def test_no_endpoint(ground: Ground) -> None:
    ground.attach(mesh(service("dns", ADDRESS)))
    unconnected = counts(ground)
    before = (reasons(ground, "sendmsg").get("no_endpoint", 0), reasons(ground, "connect").get("no_endpoint", 0))
    with client(ground) as sock:
        with pytest.raises(OSError) as refused:
            sock.sendto(b"question", DNS)
        assert refused.value.errno in (errno.ECONNREFUSED, errno.EINVAL)  # EINVAL before Linux 5.18
        sock.connect(DNS)
        with pytest.raises(OSError, match="not connected"):
            sock.getpeername()
        sock.send(b"question")
        with pytest.raises(ConnectionRefusedError):
            sock.recv(100)
    after = (reasons(ground, "sendmsg")["no_endpoint"], reasons(ground, "connect")["no_endpoint"])
    assert after == (before[0] + 1, before[1] + 1)
    assert counts(ground) == unconnected


@pytest.mark.parametrize(("family", "address"), [(socket.AF_INET, ADDRESS), (socket.AF_INET6, SIX)])
def test_no_endpoint_for_a_socket_bound_to_a_device(ground: Ground, family: socket.AddressFamily, address: str) -> None:
    """TCP is led to everybody, who refuse it. A datagram would be heard by all of them."""
    with netns.fresh():
        for command in (
            "ip link add near type veth peer name far",
            "ip link set far up",
            "ip address add 198.18.0.1/24 dev near",
            "ip link set near up",
            "ip -6 address add 2001:db8::1/64 dev near nodad",
            "ip -6 route add default dev near",
        ):
            subprocess.run(command.split(), check=True)
        ground.attach(mesh(service("dns", address)))
        with client(ground, family) as sock, SockDiag() as diag:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BINDTODEVICE, b"near")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            sock.connect((address, 53))
            (found,) = diag.connected()
            loopback = "127.0.0.1" if family == socket.AF_INET else "::1"
            assert found.peer == bytes(abi.pack_address(loopback))


# --- families --------------------------------------------------------------------------------------------------------


def test_mapped_addresses_through_an_ipv6_socket(ground: Ground, servers: list[Server]) -> None:
    a = servers[0]
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint())))
    mapped = f"::ffff:{ADDRESS}"
    with client(ground, socket.AF_INET6) as sock:
        sock.sendto(b"question", (mapped, 53))
        a.answer()
        data, source = sock.recvfrom(100)
        assert (data, source[:2]) == (b"answer to question", (mapped, 53))
        sock.connect((mapped, 53))
        assert sock.getpeername()[:2] == (mapped, 53)
        sock.send(b"question")
        a.answer()
        assert sock.recvfrom(100)[1][:2] == (mapped, 53)


def test_ipv6(ground: Ground) -> None:
    with netns.fresh(), Server("::1") as six, Server() as four:
        ground.attach(mesh(service("dns", (SIX, ADDRESS), six.endpoint(), four.endpoint())))
        found = set()
        for _ in range(4):
            with client(ground, socket.AF_INET6) as sock:
                sock.connect((SIX, 53))
                assert sock.getpeername()[:2] == (SIX, 53)
                sock.send(b"question")
                (server,) = select.select([six, four], [], [], 10)[0]
                server.answer()
                assert sock.recvfrom(100)[1][:2] == (SIX, 53)
                found.add(server)
        assert found == {six, four}
        for _ in range(4):  # an unconnected IPv6 socket cannot be led to IPv4, nor the other way round
            with client(ground, socket.AF_INET6) as sock:
                sock.sendto(b"question", (SIX, 53))
                six.answer()
                data, source = sock.recvfrom(100)
                assert (data, source[:2]) == (b"answer to question", (SIX, 53))
            with client(ground) as sock:
                assert ask(sock, four) is four


def test_no_endpoint_of_the_family(ground: Ground) -> None:
    with netns.fresh(), Server() as four:
        ground.attach(mesh(service("dns", SIX, four.endpoint())))
        with client(ground, socket.AF_INET6) as sock:
            with pytest.raises(OSError) as refused:
                sock.sendto(b"question", (SIX, 53))
            assert refused.value.errno in (errno.ECONNREFUSED, errno.EINVAL)
        ground.attach(mesh(service("dns", SIX)))
        with client(ground, socket.AF_INET6) as sock:
            sock.connect((SIX, 53))
            sock.send(b"question")
            with pytest.raises(ConnectionRefusedError):
                sock.recv(100)


# --- an endpoint that is gone ----------------------------------------------------------------------------------------


def end(ground: Ground) -> int:
    """In a thread: it comes back to the namespace that the process began in."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(stranded.end, ground.plane.maps).result()


def ended(sock: socket.socket) -> bool:
    """Whether somebody ended the socket; its application is woken up by that."""
    return bool(select.select([sock], [], [], 0)[0]) and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR) != 0


def alive(sock: socket.socket, server: Server, to: tuple[str, int]) -> bool:
    sock.send(b"question")
    server.answer()
    return sock.recvfrom(100) == (b"answer to question", to)


def test_only_sockets_connected_to_the_one_that_left_are_ended(ground: Ground, servers: list[Server]) -> None:
    a, b, c = servers
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint()), service("more", OTHER, a.endpoint())))
    socks = {name: client(ground) for name in ("to a", "blocked", "unconnected", "again", "nowhere", "other service")}
    socks["by its own address"] = client(ground)
    socks["outside"] = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    for name in ("to a", "blocked", "again", "nowhere"):
        socks[name].connect(DNS)
    socks["other service"].connect((OTHER, 53))
    assert ask(socks["unconnected"], a) is a
    for name in ("by its own address", "outside"):
        socks[name].connect((a.address, a.port))
    socks["again"].connect((c.address, c.port))
    disconnect(socks["nowhere"])
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint(), b.endpoint()), service("more", OTHER, a.endpoint())))
    socks["to b"] = client(ground)
    while True:
        socks["to b"].connect(DNS)
        socks["to b"].send(b"hello")
        if asked(a, b) is b:
            break

    assert end(ground) == 0
    ground.attach(
        mesh(
            service("dns", ADDRESS, a.endpoint(state=EndpointState.DRAINING), b.endpoint()),
            service("more", OTHER, a.endpoint()),
        )
    )
    assert end(ground) == 0
    ground.attach(mesh(service("dns", ADDRESS, b.endpoint()), service("more", OTHER, a.endpoint())))
    assert end(ground) == 2
    for name in ("to a", "blocked"):
        with pytest.raises(ConnectionAbortedError):
            socks[name].recv(100)
    assert {name for name, sock in socks.items() if ended(sock)} == set()
    assert alive(socks["to b"], b, DNS)
    assert alive(socks["other service"], a, (OTHER, 53))
    assert alive(socks["again"], c, (c.address, c.port))
    for name in ("by its own address", "outside"):
        socks[name].settimeout(10)
        assert alive(socks[name], a, (a.address, a.port))
    assert ask(socks["unconnected"], a, b) is b
    assert ask(socks["nowhere"], a, b) is b
    assert end(ground) == 0  # they are still open
    socks["to a"].connect(DNS)
    assert alive(socks["to a"], b, DNS)
    for sock in socks.values():
        sock.close()


def test_an_endpoint_that_left_alone(ground: Ground, servers: list[Server], monkeypatch: pytest.MonkeyPatch) -> None:
    """As an agent changes a mesh: only what changed is planned and written, and who applied it hears who left."""
    a, b, _ = servers
    both, one = (mesh(service("dns", ADDRESS, *(s.endpoint() for s in found))) for found in ((a, b), (b,)))
    ground.attach(both)
    opened = dataplane.open_pins(ground.instance)
    assert opened is not None
    with contextlib.closing(opened[0]) as plane, contextlib.ExitStack() as stack:
        connected, unconnected = ([stack.enter_context(client(ground)) for _ in range(2)] for _ in range(2))
        for sock in connected:
            sock.connect(DNS)
        first = [ask(sock, a, b) for sock in unconnected]
        assert sorted(first, key=servers.index) == [a, b]
        applied = plane.apply(both)
        assert (applied.writes, applied.left) == (0, False)
        applied = plane.apply(one)
        assert (applied.writes, applied.left) == (5, True)  # policy, two slots, who serves, endpoint
        assert end(ground) == 1
        assert [ask(sock, a, b) for sock in unconnected] == [b, b]
        assert not plane.apply(one).left

        plane.apply(both)
        with monkeypatch.context() as broken:
            broken.setattr(plane.maps["endpoints"], "delete_many", raise_error)
            with pytest.raises(DataplaneError):
                plane.apply(one)
        assert plane.apply(one).left, "the one that failed had written it"


def raise_error(_keys: object) -> None:
    raise DataplaneError("not today")


def test_a_service_that_is_gone_ends_nobody_whose_endpoint_is_not(ground: Ground, servers: list[Server]) -> None:
    a, b, _ = servers
    ground.attach(mesh(service("dns", ADDRESS, a.endpoint()), service("more", OTHER, b.endpoint())))
    with client(ground) as one, client(ground) as two:
        one.connect(DNS)
        two.connect((OTHER, 53))
        ground.attach(mesh(service("new", "127.96.53.3", a.endpoint())))
        assert end(ground) == 1
        assert alive(one, a, DNS)
        with pytest.raises(ConnectionAbortedError):
            two.recv(100)


@pytest.mark.parametrize(
    ("address", "endpoint"), [(SIX, "::1"), (SIX, "127.0.0.1"), (f"::ffff:{ADDRESS}", "127.0.0.1")]
)
def test_ipv6_sockets_are_ended_too(ground: Ground, address: str, endpoint: str) -> None:
    with netns.fresh(), Server(endpoint) as a, Server(endpoint) as b:
        names = (SIX, ADDRESS)
        ground.attach(mesh(service("dns", names, a.endpoint())))
        with client(ground, socket.AF_INET6) as gone, client(ground, socket.AF_INET6) as stays:
            gone.connect((address, 53))
            ground.attach(mesh(service("dns", names, b.endpoint())))
            stays.connect((address, 53))
            assert end(ground) == 1
            assert ended(gone) and not ended(stays)
