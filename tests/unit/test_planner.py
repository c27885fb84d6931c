"""A planner that remembers ends with what a whole plan gives, and its writes are as careful."""

from __future__ import annotations

import copy
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loader import abi
from loader.diff import Write
from loader.plan import ENDPOINT, POLICY, SLOT, Ids, Tables, packed, plan, service_key
from loader.planner import Planner
from meshbpf.errors import MapFull
from meshbpf.model import Agent, Endpoint, MapSizes, Mesh, Port, Protocol, Service
from tests.support.meshes import ADDRESSES, connect, do, endpoints, meshes, serving, unserved

DIALS = [(address, port, ":" not in address) for address in ADDRESSES for port in (80, 81)]


@st.composite
def chains(draw: st.DrawFn) -> list[Mesh]:
    """Meshes of which most differ from the one before in the endpoints or policies of some services alone."""
    found = [draw(meshes())]
    for _ in range(draw(st.integers(1, 5))):
        last = found[-1]
        if draw(st.integers(0, 4)) == 0:
            found.append(draw(meshes()))
            continue
        services = [
            replace(service, endpoints=tuple(draw(st.lists(endpoints, max_size=5)))) if draw(st.booleans()) else service
            for service in last.services
        ]
        policies = last.policies if draw(st.booleans()) else draw(meshes()).policies
        found.append(replace(last, services=tuple(services), policies=policies))
    return found


@settings(max_examples=80, deadline=None)
@given(chains())
def test_every_step_ends_with_the_tables_of_a_whole_plan(chain: list[Mesh]) -> None:
    planner, kernel, free = Planner(Tables(), Ids()), Tables(), Ids()
    for old, new in pairwise([Mesh(), *chain]):
        expected = plan(new, copy.deepcopy(kernel), free)
        step = planner.follow(new)
        for run in step.runs:
            for write in [Write(run.table, *row) for row in run.rows] + [
                Write(run.table, key, None) for key in run.gone
            ]:
                do(kernel, write)
                assert not unserved(kernel)
                for address, port, ipv4_socket in DIALS:
                    before, after = (serving(mesh, address, port, ipv4_socket) for mesh in (old, new))
                    led = connect(kernel, address, port, ipv4_socket)
                    if led is None:
                        assert before is None or after is None
                    else:
                        assert led.to <= (before or frozenset()) | (after or frozenset())
                        assert not led.retried
        assert kernel == expected.tables == step.plan.tables
        assert (step.plan.service_ids, step.plan.free) == (expected.service_ids, expected.free)
        free = expected.free


def one(name: str, number: int, *hosts: str, protocol: Protocol = Protocol.TCP) -> Service:
    found = tuple(Endpoint(host, {"main": 1}) for host in hosts)
    return Service(name, addresses=(f"127.96.0.{number}",), ports=(Port("main", 80, protocol),), endpoints=found)


@pytest.mark.parametrize(
    ("protocol", "tables"),
    [
        (Protocol.TCP, ["endpoints", "slots", "endpoints"]),
        (Protocol.UDP, ["endpoints", "serving", "slots", "serving", "endpoints"]),
    ],
)
def test_one_changed_endpoint_is_a_few_writes_and_no_whole_plan(protocol: Protocol, tables: list[str]) -> None:
    services = [one(f"s{number}", number, f"127.0.1.{number}", protocol=protocol) for number in range(1, 200)]
    planner = Planner(Tables(), Ids())
    assert planner.follow(Mesh(services=tuple(services))).whole
    services[50] = one("s51", 51, "127.0.2.1", protocol=protocol)
    step = planner.follow(Mesh(services=tuple(services)))
    assert not step.whole
    assert [(run.table, len(run)) for run in step.runs] == [(table, 1) for table in tables]


def test_a_full_table_is_named_before_anything_is_written() -> None:
    agent = Agent(maps=MapSizes(services=4, policies=4, slots=8, endpoints=2))
    planner = Planner(Tables(), Ids())
    planner.follow(Mesh(agent, (one("a", 1, "127.0.0.1"),)))
    with pytest.raises(MapFull, match="endpoints is full at 2"):  # the old one and two new ones, for a moment
        planner.follow(Mesh(agent, (one("a", 1, "127.0.0.2", "127.0.0.3"),)))


def test_endpoints_of_udp_services_count_for_each_of_them() -> None:
    """The table of who serves whom is as large as that of the endpoints, and is raised by the same field."""
    agent = Agent(maps=MapSizes(endpoints=2))
    both = ("127.0.0.1", "127.0.0.2")
    services = (one("a", 1, *both, protocol=Protocol.UDP), one("b", 2, protocol=Protocol.UDP))
    planner = Planner(Tables(), Ids())
    planner.follow(Mesh(agent, services))
    more = Mesh(agent, (services[0], one("b", 2, *both, protocol=Protocol.UDP)))
    for follow in (planner.follow, lambda mesh: plan(mesh, Tables())):
        with pytest.raises(MapFull, match=r"map endpoints is full at 2 entries: raise Agent\.spec\.maps\.endpoints"):
            follow(more)


def test_what_is_packed_by_hand_has_the_layouts_of_the_abi() -> None:
    for address in ("127.96.0.1", "255.0.10.9", "fd00::1"):
        assert packed(address) == bytes(abi.pack_address(address))
        assert ENDPOINT.pack(packed(address), 8080, 1, 0) == bytes(
            abi.EndpointValue(abi.pack_address(address), 8080, 1)
        )
        assert service_key(address, 80, Protocol.TCP) == bytes(abi.ServiceKey(abi.pack_address(address), 80, 6))
    assert SLOT.pack(7, 9) == bytes(abi.SlotKey(7, 9))
    assert (7).to_bytes(4, "little") + (9).to_bytes(4, "little") == bytes(abi.ServingKey(7, 9))
    assert POLICY.pack(5, 4, 1, 2, 1, 0, 9, 8) == bytes(abi.PolicyValue(5, 4, 1, 2, 1, 0, 9, 8))
