"""Others who change a call's address or refuse it: another socket load balancer, a policy of calls, netfilter.

What they see and who wins, as docs/coexistence.md tells it. The stand-ins are programs of a few instructions at the
places where Cilium's would be, and the rules that kube-proxy, docker and Istio write.
"""

from __future__ import annotations

import errno
import os
import socket
import struct
import subprocess
from collections.abc import Iterator
from dataclasses import replace

import pytest

from meshbpf.model import ConnectionPool, Endpoint, Mode, TcpPool
from tests.support import datagrams, foreign, netns
from tests.support.ground import Ground, Listener, mesh, reached, service, untouched
from tests.support.machine import until, which

ADDRESS, OTHER = "127.96.11.1", "127.96.11.2"
SERVICE = (ADDRESS, 80)
FRONTEND = ("127.96.11.9", 99)  # an address of the other load balancer's
SO_ORIGINAL_DST = 80
CONNECT = (foreign.CGROUP_SOCK_ADDR, foreign.INET4_CONNECT)


@pytest.fixture(scope="module")
def ground() -> Iterator[Ground]:
    """Led is the child `apps`: what others attach above it covers it."""
    with Ground(f"neighbours-{os.getpid()}") as made:
        made.child("apps")
        made.attach(mesh(), made.cgroup / "apps")
        yield made


@pytest.fixture
def ours() -> Iterator[Listener]:
    with Listener() as made:
        yield made


@pytest.fixture
def theirs() -> Iterator[Listener]:
    with Listener() as made:
        yield made


def place(listener: Listener) -> tuple[str, int]:
    return listener.address, listener.port


def dial(ground: Ground, where: tuple[str, int] = SERVICE) -> socket.socket:
    sock = ground.client(cgroup=ground.cgroup / "apps")
    try:
        sock.connect(where)
    except BaseException:
        sock.close()
        raise
    return sock


def endpoint_at(address: str, port: int) -> Endpoint:
    return Endpoint(address, {"main": port})


def lead_to(ground: Ground, address: str, port: int) -> None:
    ground.plane.apply(mesh(service("orders", ADDRESS, endpoint_at(address, port))))


# --- another socket load balancer ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "flags", "wins"),
    [
        pytest.param(".", None, "ours", id="above"),
        pytest.param("apps", None, "ours", id="beside-and-later"),
        pytest.param("apps/pod", None, "theirs", id="below"),
        pytest.param(".", foreign.MULTI | foreign.PREORDER, "theirs", id="above-with-preorder"),
    ],
)
def test_a_load_balancer_that_knows_the_service_too(
    ground: Ground, ours: Listener, theirs: Listener, where: str, flags: int | None, wins: str
) -> None:
    """Who is asked first leads the call; the other one sees an endpoint's address, which is no service of its own."""
    lead_to(ground, *place(ours))
    pod = ground.cgroup / "apps" / "pod"
    pod.mkdir(exist_ok=True)
    before = ground.reasons().get("direct", 0)
    try:
        with foreign.attached(ground.cgroup / where, flags, *CONNECT, foreign.translates(SERVICE, place(theirs))):
            with ground.client(cgroup=pod) as sock:
                sock.connect(SERVICE)
                assert reached(ours, theirs) is (ours if wins == "ours" else theirs)
    except OSError as error:
        if flags is not None and error.errno == errno.EINVAL:
            pytest.skip("this kernel has no BPF_F_PREORDER (from 6.15 on)")
        raise
    assert ground.reasons().get("direct", 0) == before + (wins == "ours")


def test_a_load_balancer_that_was_there_before_us(ground: Ground, ours: Listener, theirs: Listener) -> None:
    """On the same cgroup the first one to attach runs first; an attach again does not change the order."""
    late = Ground(f"late-{os.getpid()}")
    with late, foreign.attached(late.cgroup, None, *CONNECT, foreign.translates(SERVICE, place(theirs))):
        late.attach(mesh(service("orders", ADDRESS, ours.endpoint())))
        with late.connect(ADDRESS):
            assert reached(ours, theirs) is theirs
        assert late.reasons() == {}


def test_its_frontend_as_our_endpoint(ground: Ground, theirs: Listener) -> None:
    """A ClusterIP of Cilium's under `endpoints:`: it translates after us. The calls arrive, but they are no longer
    those that we led: getpeername() says the endpoint, none is counted as open, and so no limit holds.
    """
    wanted = mesh(service("orders", ADDRESS, endpoint_at(*FRONTEND)))
    one = ConnectionPool(tcp=TcpPool(max_connections=1, limits_direct=True))
    limited = {key: replace(policy, connection_pool=one) for key, policy in wanted.policies.items()}
    ground.plane.apply(replace(wanted, policies=limited))
    forth, back = foreign.translates(FRONTEND, place(theirs)), foreign.translates(place(theirs), FRONTEND)
    kind = foreign.CGROUP_SOCK_ADDR
    opened = ground.counts(ADDRESS)[0]
    with (
        foreign.attached(ground.cgroup, None, *CONNECT, forth),
        foreign.attached(ground.cgroup, None, kind, foreign.INET4_GETPEERNAME, back),
        dial(ground) as first,
        theirs.accept(),
        dial(ground) as second,
        theirs.accept(),
    ):
        assert first.getpeername() == second.getpeername() == FRONTEND
    assert ground.counts(ADDRESS)[0] == opened
    assert ground.reasons().get("over_limit", 0) == 0


def test_its_reverse_translation_does_not_meet_ours(ground: Ground, ours: Listener, theirs: Listener) -> None:
    """At getpeername() it is asked after us, about the service's address: nothing that it has a note of."""
    lead_to(ground, *place(ours))
    back = foreign.translates(place(ours), FRONTEND)
    kind = foreign.CGROUP_SOCK_ADDR
    with foreign.attached(ground.cgroup, None, kind, foreign.INET4_GETPEERNAME, back), dial(ground) as sock:
        assert reached(ours, theirs) is ours
        assert sock.getpeername() == SERVICE


def test_datagrams_of_an_unconnected_socket(ground: Ground) -> None:
    """sendmsg as connect: we are asked first, and the answer comes from the service's address."""
    server, other = datagrams.Server(), datagrams.Server()
    with server, other:
        ground.plane.apply(mesh(datagrams.service("dns", ADDRESS, server.endpoint())))
        code = foreign.translates((ADDRESS, 53), (other.address, other.port))
        kind = foreign.CGROUP_SOCK_ADDR
        with foreign.attached(ground.cgroup, None, kind, foreign.UDP4_SENDMSG, code):
            with ground.client(cgroup=ground.cgroup / "apps", kind=socket.SOCK_DGRAM) as sock:
                sock.sendto(b"question", (ADDRESS, 53))
                server.answer()
                assert sock.recvfrom(100) == (b"answer to question", (ADDRESS, 53))


# --- those who refuse ------------------------------------------------------------------------------------------------


def test_a_policy_of_calls_judges_the_endpoint(ground: Ground, ours: Listener) -> None:
    """Above us it never meets the service's address; what it refuses is EPERM for the application, and no verdict of
    ours.
    """
    lead_to(ground, *place(ours))
    with foreign.attached(ground.cgroup, None, *CONNECT, foreign.denies(SERVICE)), dial(ground):
        assert reached(ours) is ours
    with foreign.attached(ground.cgroup, None, *CONNECT, foreign.denies(place(ours))):
        with pytest.raises(PermissionError):
            dial(ground)
    assert untouched(ours)
    with dial(ground):
        assert reached(ours) is ours


def test_an_inner_instance_leads_to_a_service_of_the_outer_one(ground: Ground, ours: Listener) -> None:
    """Both lead, one after the other; the application is told what the outer one was asked."""
    inner = Ground(f"inner-{os.getpid()}")
    ground.plane.apply(mesh(service("users", OTHER, endpoint_at(*place(ours)))))
    pod = ground.cgroup / "apps" / "pod"
    pod.mkdir(exist_ok=True)
    with inner, ground.client(cgroup=pod) as sock:
        inner.attach(mesh(service("orders", ADDRESS, endpoint_at(OTHER, 80))), pod)
        sock.connect(SERVICE)
        assert reached(ours) is ours
        assert sock.getpeername() == (OTHER, 80)
        assert (inner.reasons()["direct"], inner.counts(ADDRESS)[0]) == (1, 0)
        until(lambda: ground.counts(OTHER)[0] == 1, "counted by the one who led it last")


# --- netfilter -------------------------------------------------------------------------------------------------------


@pytest.fixture
def alone() -> Iterator[None]:
    """In a namespace of its own, with an interface out of it: 198.18.0.1; nobody else is on the wire."""
    with netns.fresh():
        for command in (
            "ip link add wire type veth peer name far",
            "ip address add 198.18.0.1/24 dev wire",
            "ip link set wire up",
            "ip link set far up",
        ):
            subprocess.run(command.split(), check=True)
        yield


def rules(table: str, *lines: str) -> None:
    for line in lines:
        subprocess.run([which("iptables"), "-w", "-t", table, *line.split()], check=True)


def met(table: str) -> dict[str, int]:
    """How many packets met each rule of OUTPUT, by its comment-free text."""
    done = subprocess.run([which("iptables-save"), "-c", "-t", table], capture_output=True, text=True, check=True)
    lines = [line for line in done.stdout.splitlines() if " -A OUTPUT " in line]
    return {line.split(" -A OUTPUT ")[1]: int(line[1 : line.index(":")]) for line in lines}


def test_kube_proxy_does_not_meet_what_we_lead(ground: Ground, alone: None) -> None:
    """Its rule for the ClusterIP that is our service's address: only callers outside of the mesh come to it."""
    with Listener() as a, Listener() as b:
        rules("nat", f"-A OUTPUT -d {ADDRESS}/32 -p tcp --dport 80 -j DNAT --to-destination {b.address}:{b.port}")
        lead_to(ground, *place(a))
        with dial(ground):
            assert reached(a, b) is a
        assert set(met("nat").values()) == {0}
        with socket.create_connection(SERVICE, 5):
            assert reached(a, b) is b
        assert set(met("nat").values()) == {1}


@pytest.mark.parametrize(
    ("endpoint", "matches"),
    [
        pytest.param(("198.18.0.1", 8080), "! -d 127.0.0.0/8 -m addrtype --dst-type LOCAL", id="published-port"),
        pytest.param(("198.18.0.9", 8080), "-d 198.18.0.9", id="clusterip"),
    ],
)
def test_an_endpoint_behind_a_rule_of_others(
    ground: Ground, alone: None, endpoint: tuple[str, int], matches: str
) -> None:
    """docker's published port, kube-proxy's ClusterIP as `endpoints:`: translated per packet, after us, and unseen by
    the socket, so nothing of ours is lost.
    """
    with Listener("198.18.0.1") as container:
        target = f"-j DNAT --to-destination {container.address}:{container.port}"
        rules("nat", f"-A OUTPUT {matches} -p tcp --dport {endpoint[1]} {target}")
        lead_to(ground, *endpoint)
        opened = ground.counts(ADDRESS)[0]
        with dial(ground) as sock:
            assert reached(container) is container
            assert sock.getpeername() == SERVICE
        until(lambda: ground.counts(ADDRESS)[0] == opened + 1, "counted")


def test_a_firewall_judges_the_endpoint(ground: Ground, alone: None) -> None:
    """A rule about the service's address is met by nobody whom we lead; one about the endpoint is."""
    with Listener() as a:
        rules("filter", f"-A OUTPUT -d {ADDRESS} -p tcp -j REJECT --reject-with tcp-reset")
        lead_to(ground, *place(a))
        with dial(ground):
            assert reached(a) is a
        rules("filter", f"-A OUTPUT -d {a.address} -p tcp --dport {a.port} -j REJECT --reject-with tcp-reset")
        with pytest.raises(ConnectionRefusedError):
            dial(ground)
        assert untouched(a)


def test_a_firewall_before_the_proxy(ground: Ground, alone: None) -> None:
    """connect() finds the listener, which no rule hides, and leads there: the call fails whatever onProxyDown says."""
    with Listener() as a, Listener() as proxy:
        rules("filter", f"-A OUTPUT -o lo -p tcp --dport {proxy.port} -j REJECT --reject-with tcp-reset")
        ground.plane.apply(mesh(service("orders", ADDRESS, endpoint_at(*place(a))), mode=Mode.PROXY))
        with ground.client(cgroup=ground.cgroup / "apps") as sock:
            ground.proxy(proxy)
            with pytest.raises(ConnectionRefusedError):
                sock.connect(SERVICE)
        assert untouched(a, proxy)


ISTIO = (
    "-N ISTIO_OUTPUT", "-A OUTPUT -p tcp -j ISTIO_OUTPUT",
    "-A ISTIO_OUTPUT -o lo -m owner ! --uid-owner 1337 -j RETURN",
    "-A ISTIO_OUTPUT -m owner --uid-owner 1337 -j RETURN",
    "-A ISTIO_OUTPUT -d 127.0.0.1/32 -j RETURN",
)  # fmt: skip


def test_istio_s_redirect_takes_what_leaves_the_pod(ground: Ground, alone: None) -> None:
    """direct: its sidecar gets the call, addressed to the endpoint; it cannot know the service any more. A governed
    call is led to 127.0.0.1, which its rules leave alone.
    """
    with Listener() as envoy, Listener() as proxy:
        rules("nat", *ISTIO, f"-A ISTIO_OUTPUT -p tcp -j REDIRECT --to-ports {envoy.port}")
        lead_to(ground, "198.18.0.2", 8080)
        with dial(ground) as sock, envoy.accept() as accepted:
            said = accepted.getsockopt(socket.IPPROTO_IP, SO_ORIGINAL_DST, 16)
            assert (socket.inet_ntoa(said[4:8]), struct.unpack("!H", said[2:4])[0]) == ("198.18.0.2", 8080)
            assert sock.getpeername() == SERVICE
        ground.plane.apply(mesh(service("orders", ADDRESS, endpoint_at("198.18.0.2", 8080)), mode=Mode.PROXY))
        with ground.client(cgroup=ground.cgroup / "apps") as sock:
            ground.proxy(proxy)
            sock.connect(SERVICE)
            assert reached(envoy, proxy) is proxy
