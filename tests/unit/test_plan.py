"""What every table has to hold for a mesh: rows, ids that last, shares, and room."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader import abi
from loader.diff import diff
from loader.plan import Ids, Tables, plan, service_key
from loader.slots import MAX_SHARES, interleave, shares
from meshbpf.errors import MapFull
from meshbpf.model import (
    Agent,
    Balance,
    ConnectionPool,
    Endpoint,
    EndpointState,
    LoadBalancer,
    MapSizes,
    Mesh,
    Mode,
    OnProxyDown,
    Port,
    Protocol,
    Service,
    ServicePolicy,
    TcpPool,
)
from tests.support.meshes import do, meshes

HTTP, TCP = Port("http", 80, Protocol.HTTP), Port("tcp", 90, Protocol.TCP)
UDP = Port("udp", 80, Protocol.UDP)


def number(raw: bytes) -> int:
    return int.from_bytes(raw, "little")


def mesh(*services: Service, **policy: object) -> Mesh:
    policies = {s.id: ServicePolicy(service=s.name, **policy) for s in services}  # type: ignore[arg-type]
    return Mesh(services=services, policies=policies if policy else {})


def policies_of(tables: Tables) -> dict[int, abi.PolicyValue]:
    return {number(key): abi.PolicyValue.from_buffer_copy(value) for key, value in tables.policies.items()}


def hosts_of(tables: Tables, service_id: int) -> list[str]:
    """The endpoint behind each slot, in order."""
    found = []
    for index in range(policies_of(tables)[service_id].slots):
        value = tables.endpoints[tables.slots[bytes(abi.SlotKey(service_id, index))]]
        found.append(abi.unpack_address(abi.EndpointValue.from_buffer_copy(value).address))
    return found


def test_every_row_of_a_small_mesh() -> None:
    orders = Service(
        "orders",
        addresses=("127.96.0.1", "fd00::1"),
        ports=(HTTP, TCP, UDP),
        endpoints=(Endpoint("127.0.0.1", {"http": 8080}, 2), Endpoint("127.0.0.2", {"http": 8080, "tcp": 9090}, 1)),
    )
    planned = plan(mesh(orders), Tables())
    tables = planned.tables
    assert tables.services == {
        service_key("127.96.0.1", 80, Protocol.HTTP): b"\1\0\0\0",
        service_key("fd00::1", 80, Protocol.HTTP): b"\1\0\0\0",
        service_key("127.96.0.1", 90, Protocol.TCP): b"\2\0\0\0",
        service_key("fd00::1", 90, Protocol.TCP): b"\2\0\0\0",
        service_key("127.96.0.1", 80, Protocol.UDP): b"\3\0\0\0",
        service_key("fd00::1", 80, Protocol.UDP): b"\3\0\0\0",
    }
    http, tcp = policies_of(tables)[1], policies_of(tables)[2]
    assert (http.slots, http.slots4, http.carrier, http.pick) == (3, 3, abi.Carried.PROXY, abi.Pick.ROUND_ROBIN)
    assert (tcp.slots, tcp.slots4, tcp.carrier, tcp.on_proxy_down) == (1, 1, abi.Carried.DIRECT, abi.Down.DIRECT)
    assert Counter(hosts_of(tables, 1)) == {"127.0.0.1": 2, "127.0.0.2": 1}
    assert hosts_of(tables, 2) == ["127.0.0.2"]
    assert len(tables.slots) == 4
    assert len(tables.endpoints) == 3
    assert planned.service_ids == {1: (orders, HTTP), 2: (orders, TCP), 3: (orders, UDP)}
    assert planned.free == Ids(4, 4)


def test_a_policy_is_told_to_the_kernel() -> None:
    orders = Service("orders", addresses=("127.96.0.1",), ports=(TCP,))
    random = LoadBalancer(Balance.RANDOM)
    wanted = mesh(orders, mode=Mode.PROXY, on_proxy_down=OnProxyDown.REFUSE, load_balancer=random)
    (told,) = policies_of(plan(wanted, Tables()).tables).values()
    assert (told.carrier, told.pick, told.on_proxy_down) == (abi.Carried.PROXY, abi.Pick.RANDOM, abi.Down.REFUSE)


def test_draining_and_weightless_endpoints_have_no_slot() -> None:
    gone = Endpoint("127.0.0.1", {"tcp": 1}, state=EndpointState.DRAINING)
    none = Endpoint("127.0.0.2", {"tcp": 1}, weight=0)
    last = Endpoint("127.0.0.3", {"tcp": 1})
    tables = plan(mesh(Service("a", addresses=("127.96.0.1",), ports=(TCP,), endpoints=(gone, none, last))), Tables())
    assert hosts_of(tables.tables, 1) == ["127.0.0.3"]
    values = [abi.EndpointValue.from_buffer_copy(value) for value in tables.tables.endpoints.values()]
    assert {abi.unpack_address(v.address): v.draining for v in values} == {
        "127.0.0.1": 1, "127.0.0.2": 0, "127.0.0.3": 0,
    }  # fmt: skip


@pytest.mark.parametrize("backwards", [False, True])
def test_an_endpoint_drains_only_where_every_service_says_so(backwards: bool) -> None:
    ready, draining = (Endpoint("127.0.0.1", {"tcp": 1}, state=state) for state in EndpointState)
    both = [
        Service("a", addresses=("127.96.0.1",), ports=(TCP,), endpoints=(ready,)),
        Service("b", addresses=("127.96.0.2",), ports=(TCP,), endpoints=(draining,)),
    ]
    tables = plan(mesh(*(reversed(both) if backwards else both)), Tables()).tables
    (value,) = tables.endpoints.values()
    assert abi.EndpointValue.from_buffer_copy(value).draining == 0
    assert sorted(policy.slots for policy in policies_of(tables).values()) == [0, 1]


def test_ipv4_slots_come_first() -> None:
    mixed = tuple(Endpoint(host, {"tcp": 1}, 2) for host in ("fd00::a", "127.0.0.1", "fd00::b", "127.0.0.2"))
    planned = plan(mesh(Service("a", addresses=("127.96.0.1",), ports=(TCP,), endpoints=mixed)), Tables())
    policy = policies_of(planned.tables)[1]
    assert (policy.slots, policy.slots4) == (4, 2)
    assert hosts_of(planned.tables, 1) == ["127.0.0.1", "127.0.0.2", "fd00::a", "fd00::b"]


@settings(max_examples=200, deadline=None)
@given(meshes(), meshes())
def test_ids_last_as_long_as_what_they_name_and_never_come_back(old: Mesh, new: Mesh) -> None:
    first = plan(old, Tables())
    again = plan(old, first.tables, first.free)
    assert list(diff(first.tables, again.tables)) == []
    assert again.free == first.free
    empty = plan(Mesh(), again.tables, again.free)
    later = plan(new, empty.tables, empty.free)
    assert not set(later.service_ids) & set(first.service_ids)
    assert not set(later.tables.endpoints) & set(first.tables.endpoints)


@settings(max_examples=200, deadline=None)
@given(meshes(), meshes())
def test_a_service_that_keeps_its_addresses_keeps_its_id(old: Mesh, new: Mesh) -> None:
    first = plan(old, Tables())
    second = plan(new, first.tables, first.free)
    before = {(s.name, s.addresses, p.name): i for i, (s, p) in first.service_ids.items()}
    for service_id, (service, port) in second.service_ids.items():
        known = before.get((service.name, service.addresses, port.name))
        assert known in (None, service_id)


@settings(max_examples=100, deadline=None)
@given(st.lists(meshes(), max_size=4))
def test_the_way_there_does_not_matter_but_for_ids(several: list[Mesh]) -> None:
    """Rows reached over other meshes are as many, and of the same services, as rows made at once."""
    kernel, free = Tables(), Ids()
    for each in several:
        planned = plan(each, kernel, free)
        for write in list(diff(kernel, planned.tables)):
            do(kernel, write)
        free = planned.free
    at_once = plan(several[-1] if several else Mesh(), Tables()).tables
    assert kernel.services.keys() == at_once.services.keys()
    assert sorted(kernel.endpoints.values()) == sorted(at_once.endpoints.values())
    assert sorted(kernel.policies.values()) == sorted(at_once.policies.values())
    assert len(kernel.slots) == len(at_once.slots)


@given(st.lists(st.integers(1, 10_000), min_size=1, max_size=20))
def test_shares_are_whole_small_and_right(weights: list[int]) -> None:
    found = shares(weights)
    assert all(1 <= share <= max(MAX_SHARES, 1) for share in found)
    for weight, share in zip(weights, found, strict=True):
        exact = weight * max(found) / max(weights)
        assert abs(share - exact) <= max(0.5, 1 - exact)


def test_shares_by_example() -> None:
    assert shares([100, 100, 100]) == [1, 1, 1]
    assert shares([300, 200, 100]) == [3, 2, 1]
    assert shares([0, 10]) == [0, 1]
    assert shares([0, 0]) == [0, 0]
    assert shares([]) == []
    assert shares([1, 1000]) == [1, 100]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=12))
def test_interleaving_is_exact_and_even(counts: list[int]) -> None:
    order = interleave(counts)
    assert Counter(order) == Counter({index: count for index, count in enumerate(counts) if count})
    for index, count in enumerate(counts):
        turns = [at for at, which in enumerate(order) if which == index]
        for nth, at in enumerate(turns):
            ideal = (nth + 0.5) * len(order) / count
            assert abs(at - ideal) <= len(counts)


@pytest.mark.parametrize("field", ["services", "policies", "slots", "endpoints"])
def test_no_room_names_the_field(field: str) -> None:
    two = tuple(Endpoint(f"127.0.0.{n}", {"tcp": 1}) for n in (1, 2))
    one = Service("a", addresses=("127.96.0.1", "127.96.0.2"), ports=(TCP, HTTP), endpoints=two)
    wanted = Mesh(Agent(maps=MapSizes(**{field: 1})), (one,))
    with pytest.raises(MapFull, match=rf"Agent\.spec\.maps\.{field}"):
        plan(wanted, Tables())


def test_room_is_for_old_and_new_rows_together() -> None:
    """Both are in the table while writes go on: it has to be said before the first one."""

    def with_hosts(*hosts: str) -> Mesh:
        found = tuple(Endpoint(host, {"tcp": 1}) for host in hosts)
        only = Service("a", addresses=("127.96.0.1",), ports=(TCP,), endpoints=found)
        return Mesh(Agent(maps=MapSizes(endpoints=3, services=1)), (only,))

    have = plan(with_hosts("127.0.0.1", "127.0.0.2"), Tables()).tables
    plan(with_hosts("127.0.0.1", "127.0.0.3"), have)
    with pytest.raises(MapFull, match="endpoints"):
        plan(with_hosts("127.0.0.3", "127.0.0.4"), have)


def test_only_a_limit_that_was_written_down_is_the_kernel_s_and_only_of_direct_tcp() -> None:
    orders = Service("orders", addresses=("127.96.0.1",), ports=(HTTP, TCP, UDP))
    for written, expected in ((False, [0, 0, 0]), (True, [0, 7, 0])):
        pool = ConnectionPool(tcp=TcpPool(max_connections=7, limits_direct=written))
        held = policies_of(plan(mesh(orders, connection_pool=pool), Tables()).tables)
        assert [held[service_id].limit for service_id in (1, 2, 3)] == expected
