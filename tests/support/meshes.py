"""Random meshes, and a connect() simulated on raw tables, for the tests of plan and diff."""

from __future__ import annotations

from dataclasses import dataclass

from hypothesis import strategies as st

from loader import abi
from loader.diff import Write
from loader.plan import Tables
from meshbpf.model import (
    ConsistentHash,
    Endpoint,
    EndpointState,
    LoadBalancer,
    Maglev,
    Mesh,
    Mode,
    Port,
    Protocol,
    Service,
    ServicePolicy,
    SessionAffinity,
)

ADDRESSES = ["127.96.0.1", "127.96.0.2", "127.96.0.3", "fd00::1"]
HOSTS = ["127.0.0.1", "127.0.0.2", "127.0.0.3", "fd00::a", "fd00::b"]
NAMES = ["a", "b", "c", "d"]
Target = tuple[str, int]

endpoints = st.builds(
    Endpoint,
    st.sampled_from(HOSTS),
    st.fixed_dictionaries(
        {}, optional={"main": st.sampled_from([1, 2]), "more": st.sampled_from([2, 3]), "datagrams": st.just(1)}
    ),
    st.sampled_from([0, 1, 1, 2, 6]),
    state=st.sampled_from(EndpointState),
)
# Seven and eleven are small for a table, and few enough to look at all of them after every write.
BALANCERS = (
    LoadBalancer(),
    LoadBalancer(session_affinity=SessionAffinity.CLIENT_IP),
    *(LoadBalancer(consistent_hash=ConsistentHash(True, Maglev(size))) for size in (7, 11)),
)
PORTS = (Port("main", 80, Protocol.TCP), Port("more", 81, Protocol.HTTP), Port("datagrams", 80, Protocol.UDP))


@st.composite
def meshes(draw: st.DrawFn) -> Mesh:
    """Services in any order, an address at most in one of them, as merging sees to."""
    owners = {address: draw(st.sampled_from([*NAMES, ""])) for address in ADDRESSES}
    services = []
    for name in draw(st.permutations(NAMES)):
        addresses = tuple(address for address, owner in owners.items() if owner == name)
        if addresses:
            ports = tuple(draw(st.lists(st.sampled_from(PORTS), min_size=1, max_size=3, unique=True)))
            found = tuple(draw(st.lists(endpoints, max_size=6)))
            services.append(Service(name, addresses=addresses, ports=ports, endpoints=found))
    policies = {
        (s.name, "default"): ServicePolicy(
            service=s.name, mode=draw(st.sampled_from(Mode)), load_balancer=draw(st.sampled_from(BALANCERS))
        )
        for s in services
    }
    return Mesh(services=tuple(services), policies=policies)


def do(tables: Tables, write: Write) -> None:
    table = getattr(tables, write.table)
    if write.value is None:
        del table[write.key]  # a delete of what is not there would be a write too many
    else:
        table[write.key] = write.value


@dataclass(frozen=True)
class Led:
    """Every endpoint that some position of the round could lead to; `tries` more than one slot was needed."""

    to: frozenset[Target]
    refused: bool
    retried: bool


def connect(tables: Tables, address: str, port: int, ipv4_socket: bool) -> Led | None:
    """What connect.c does with the address, at every position of the round; None: it is no service."""
    raw = tables.services.get(bytes(abi.ServiceKey(abi.pack_address(address), port, 6)))
    if raw is None:
        return None
    policy = abi.PolicyValue.from_buffer_copy(tables.policies[raw])  # a service without one would be left alone
    first, count = 0, policy.slots4 if ipv4_socket else policy.slots
    if policy.pick == abi.Pick.HASH_OF_BOTH:
        first, count = 0 if ipv4_socket else 2 * policy.slots4, policy.slots4
    found: set[Target] = set()
    refused, retried = not count, False
    for start in range(count):
        for attempt in range(abi.PICK_TRIES):
            key = bytes(abi.SlotKey(int.from_bytes(raw, "little"), first + (start + attempt) % count))
            endpoint = abi.EndpointValue.from_buffer_copy(tables.endpoints[tables.slots[key]])
            name = abi.unpack_address(endpoint.address)
            if not endpoint.draining and not (ipv4_socket and ":" in name):
                found.add((name, endpoint.port))
                break
            retried = True
        else:
            refused = True
    return Led(frozenset(found), refused, retried)


def unserved(tables: Tables) -> set[bytes]:
    """Endpoints that a UDP service leads to, and whose sockets would be taken for stranded."""
    led: set[bytes] = set()
    for key, raw in tables.services.items():
        if abi.ServiceKey.from_buffer_copy(key).protocol == 17:
            policy, service_id = abi.PolicyValue.from_buffer_copy(tables.policies[raw]), int.from_bytes(raw, "little")
            led |= {raw + tables.slots[bytes(abi.SlotKey(service_id, index))] for index in range(policy.slots)}
    return led - tables.serving.keys()


def serving(mesh: Mesh, address: str, port: int, ipv4_socket: bool) -> frozenset[Target] | None:
    """Who should serve the address by the mesh alone; None: it is no service."""
    for service in mesh.services:
        for one in service.ports:
            if address in service.addresses and one.port == port and one.protocol is not Protocol.UDP:
                return frozenset(
                    (e.address, e.ports[one.name])
                    for e in service.endpoints
                    if one.name in e.ports
                    and e.state is EndpointState.READY
                    and e.weight > 0
                    and not (ipv4_socket and ":" in e.address)
                )
    return None
