"""MPTCP clients: their first path is led like any TCP connection, and the application is told what it dialled."""

from __future__ import annotations

import ctypes as ct
import os
import socket
import subprocess
from collections.abc import Iterator

import pytest
from pyroute2 import IPRoute

from loader import abi, btf, dataplane
from meshbpf.model import Mode, OnProxyDown
from tests.support import netns
from tests.support.ground import SECONDS, Ground, Listener, mesh, reached, service
from tests.support.machine import until

IPPROTO_MPTCP, SOL_MPTCP, MPTCP_INFO = 262, 284, 1
FOUR, SIX = "127.96.13.1", "fd00:96::13"
# name → what is dialled, family of the socket, address of the service, of the endpoint and proxy
CALLERS = {
    "v4": (FOUR, socket.AF_INET, FOUR, "127.0.0.1"),
    "mapped": (f"::ffff:{FOUR}", socket.AF_INET6, FOUR, "127.0.0.1"),
    "v6": (SIX, socket.AF_INET6, SIX, "::1"),
}
caller = pytest.mark.parametrize(("dialled", "family", "asked", "address"), CALLERS.values(), ids=CALLERS)


class MptcpListener(Listener):
    """An endpoint that speaks MPTCP."""

    def __init__(self, address: str) -> None:
        super().__init__(address)
        self.socket.close()
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self.socket = socket.socket(family, socket.SOCK_STREAM, IPPROTO_MPTCP)
        self.socket.bind((address, self.port))
        self.socket.listen(16)
        self.socket.settimeout(SECONDS)


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    with Ground(f"mptcp-{os.getpid()}") as made:
        try:
            made.client(protocol=IPPROTO_MPTCP).close()
        except OSError as error:
            pytest.skip(f"this kernel has no MPTCP: {error.strerror}")
        if not btf.leads_to_mptcp():
            pytest.skip("before 5.19, getpeername() of an MPTCP socket tells the endpoint's address")
        yield made


@pytest.fixture(autouse=True)
def namespace() -> Iterator[int]:
    with netns.fresh() as made:
        yield made


def counted(ground: Ground) -> int:
    return ground.plane.counters().get(("sockops", "mptcp"), 0)


def after(counts: tuple[int, int, int, int], direct: int, proxied: int) -> tuple[int, int, int, int]:
    """These counts, with as many connections more that have come and gone."""
    return counts[0] + direct, counts[1] + proxied, counts[2] + direct, counts[3] + proxied


def paths(sock: socket.socket) -> int:
    """Subflows besides the first; -1 when it has fallen back to TCP."""
    try:
        return sock.getsockopt(SOL_MPTCP, MPTCP_INFO, 1)[0]
    except OSError:
        return -1


def talk(client: socket.socket, server: socket.socket) -> None:
    """Both ways, more than any buffer takes in one go, and both ends."""
    data = os.urandom(1 << 16)
    for sender, receiver in ((client, server), (server, client)):
        sender.sendall(data)
        got = b""
        while len(got) < len(data):
            got += receiver.recv(1 << 16)
        assert got == data
    client.shutdown(socket.SHUT_WR)
    assert server.recv(1) == b""
    server.sendall(b"answer after the end")
    server.close()
    got = b""
    while more := client.recv(100):
        got += more
    assert got == b"answer after the end"


@caller
@pytest.mark.parametrize("kind", [Listener, MptcpListener])
def test_direct(ground: Ground, kind: type[Listener], dialled: str, family: int, asked: str, address: str) -> None:
    """To an endpoint that speaks MPTCP, and to one that makes it fall back."""
    with kind(address) as endpoint:
        ground.attach(mesh(service("orders", asked, endpoint.endpoint())))
        before, earlier = counted(ground), ground.counts(asked)
        with ground.client(family, protocol=IPPROTO_MPTCP) as sock:
            sock.connect((dialled, 80))
            assert sock.getpeername()[:2] == (dialled, 80)
            assert (paths(sock) >= 0) is (kind is MptcpListener)
            talk(sock, endpoint.accept())
        assert counted(ground) == before + 1
        until(lambda: ground.counts(asked) == after(earlier, 1, 0), "it is counted as closed")


@caller
def test_proxy(ground: Ground, dialled: str, family: int, asked: str, address: str) -> None:
    """The proxy knows where it was going; its listener speaks TCP, so it falls back."""
    with Listener(address) as proxy:
        ground.attach(mesh(service("orders", asked), mode=Mode.PROXY))
        before, earlier = counted(ground), ground.counts(asked)
        with ground.client(family, protocol=IPPROTO_MPTCP) as sock:
            ground.proxy(proxy)
            sock.connect((dialled, 80))
            assert sock.getpeername()[:2] == (dialled, 80)
            server = proxy.accept()
            told = ground.origin(dataplane.netns_cookie(server), *server.getpeername()[:2])
            assert told is not None and abi.unpack_address(told.asked) == asked
            talk(sock, server)
        assert counted(ground) == before + 1
        until(lambda: ground.counts(asked) == after(earlier, 0, 1), "it is counted as closed")


@caller
def test_refused(ground: Ground, dialled: str, family: int, asked: str, address: str) -> None:
    ground.attach(mesh(service("orders", asked), mode=Mode.PROXY, down=OnProxyDown.REFUSE))
    with ground.client(family, protocol=IPPROTO_MPTCP) as sock:
        with pytest.raises(ConnectionRefusedError):
            sock.connect((dialled, 80))


@caller
def test_what_is_no_service_is_left_alone(ground: Ground, dialled: str, family: int, asked: str, address: str) -> None:
    with MptcpListener(address) as other:
        ground.attach(mesh(service("orders", asked)))
        before = counted(ground)
        with ground.client(family, protocol=IPPROTO_MPTCP) as sock:
            to = f"::ffff:{address}" if family == socket.AF_INET6 and ":" not in address else address
            sock.connect((to, other.port))
            assert sock.getpeername()[:2] == (to, other.port)
            talk(sock, other.accept())
        assert counted(ground) == before


def test_connected_again(ground: Ground) -> None:
    """One socket to one service, to another one, and to nobody of ours."""
    with Listener() as a, Listener() as b:
        ground.attach(mesh(service("orders", FOUR, a.endpoint()), service("bills", "127.96.13.2", b.endpoint())))
        with ground.client(protocol=IPPROTO_MPTCP) as sock:
            for to, port, endpoint in ((FOUR, 80, a), ("127.96.13.2", 80, b), ("127.0.0.1", a.port, a), (FOUR, 80, a)):
                sock.connect((to, port))
                assert reached(a, b) is endpoint
                assert sock.getpeername() == (to, port)
                unconnect(sock)


def unconnect(sock: socket.socket) -> None:
    """Dissolve the connection: connect() with AF_UNSPEC, for which Python has no word."""
    libc = ct.CDLL(None, use_errno=True)
    assert libc.connect(sock.fileno(), bytes(16), 16) == 0, os.strerror(ct.get_errno())


def test_further_paths_go_where_the_first_one_went(ground: Ground, namespace: int) -> None:
    """Two networks between caller and endpoint: the second path is the kernel's doing, neither led nor counted."""
    with netns.fresh() as other:
        with netns.inside(namespace):
            join(namespace, other)
        endpoint = MptcpListener("198.18.1.2")
    with netns.inside(namespace):
        with endpoint:
            ground.attach(mesh(service("orders", FOUR, endpoint.endpoint())))
            before, earlier = counted(ground), ground.counts(FOUR)
            with ground.client(protocol=IPPROTO_MPTCP) as sock:
                sock.connect((FOUR, 80))
                server = endpoint.accept()
                sock.sendall(b"x")
                assert server.recv(1) == b"x"
                until(lambda: paths(sock) == 1, "there is a second path")
                assert sock.getpeername() == (FOUR, 80)
                talk(sock, server)
            assert counted(ground) == before + 1
            until(lambda: ground.counts(FOUR) == after(earlier, 1, 0), "one connection is counted")


def join(here: int, there: int) -> None:
    """Two networks, 198.18.1.0/24 and 198.18.2.0/24, with us at .1 and the other one at .2; MPTCP may use both."""
    for number in (1, 2):
        with IPRoute() as links:
            links.link("add", ifname=f"v{number}", kind="veth", peer={"ifname": f"v{number}", "net_ns_fd": there})
        for where, host in ((here, 1), (there, 2)):
            with netns.inside(where), IPRoute() as links:
                (index,) = links.link_lookup(ifname=f"v{number}")
                links.addr("add", index=index, address=f"198.18.{number}.{host}", prefixlen=24)
                links.link("set", index=index, state="up")
    for where in (here, there):
        with netns.inside(where):
            mptcp("limits", "set", "subflow", "2")
    mptcp("endpoint", "add", "198.18.2.1", "dev", "v2", "subflow")


def mptcp(*words: str) -> None:
    subprocess.run(["ip", "mptcp", *words], check=True, capture_output=True, timeout=SECONDS)
