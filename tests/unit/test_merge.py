"""Merging: who wins for each part of a service, what is left out and why, and what the pool gives."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from meshbpf.model import (
    AdminSettings,
    Agent,
    ConsistentHash,
    EmbeddedRegistry,
    Endpoint,
    LoadBalancer,
    Mesh,
    Mode,
    Port,
    Protocol,
    Service,
    ServicePolicy,
)
from meshbpf.registry.base import Snapshot
from meshbpf.registry.claims import Problem
from meshbpf.registry.merge import Merger, mesh, policies, wanted
from tests.support.meshes import endpoints, meshes

HTTP = Port("http", 80, Protocol.HTTP)
ORDERS = Service("orders", addresses=("127.96.0.10",), ports=(HTTP,), source="mesh.yaml:3:18")


def endpoint(address: str, number: int = 8080, weight: int = 100, **ports: int) -> Endpoint:
    return Endpoint(address, ports or {"http": number}, weight=weight)


def registry(*services: Service, allow_loopback: bool = True) -> Snapshot:
    return Snapshot(services, source="registry", allow_loopback=allow_loopback)


def only(merged: Mesh) -> Service:
    (service,) = merged.services
    return service


def test_nothing_gives_the_default_mesh() -> None:
    merged = mesh([], {}, 7)
    assert merged.mesh == Mesh(generation=7)
    assert (merged.problems, dict(merged.given)) == ((), {})


def test_the_first_agent_and_the_first_policy_of_a_service_win() -> None:
    first = Snapshot(policies=(ServicePolicy("a", service="orders", mode=Mode.DIRECT),))
    second = Snapshot(
        policies=(ServicePolicy("b", service="orders"), ServicePolicy("c", "shop", "orders")),
        agent=Agent(address_pool="127.97.0.0/16"),
    )
    third = Snapshot(agent=Agent())
    merged = mesh([first, second, third], {}).mesh
    assert merged.agent.address_pool == "127.97.0.0/16"
    assert {key: policy.name for key, policy in merged.policies.items()} == {
        ("orders", "default"): "a",
        ("orders", "shop"): "c",
    }
    assert merged.policies == policies([first, second, third])


def test_attributes_come_from_the_first_source_that_has_them() -> None:
    bare = Service("orders", addresses=("127.96.0.10",), source="mesh.yaml:3:18")
    known = Service("orders", labels={"team": "shop"}, addresses=("192.0.2.1",), ports=(HTTP,), source="registry")
    merged = only(mesh([Snapshot((bare,)), registry(known)], {}).mesh)
    assert merged == replace(known, addresses=("127.96.0.10",), source="mesh.yaml:3:18")


def test_endpoints_are_united_and_the_earlier_source_has_its_way() -> None:
    files = replace(ORDERS, endpoints=(endpoint("192.0.2.1", weight=5),))
    other = replace(
        ORDERS, endpoints=(endpoint("192.0.2.1", weight=50), endpoint("192.0.2.2"), endpoint("192.0.2.1", 81))
    )
    merged = mesh([Snapshot((files,), source="files"), registry(other)], {})
    assert only(merged.mesh).endpoints == (
        replace(endpoint("192.0.2.1", weight=5), source="files"),
        replace(endpoint("192.0.2.2"), source="registry"),
        replace(endpoint("192.0.2.1", 81), source="registry"),
    )
    assert merged.problems == ()


def test_an_endpoint_known_twice_with_other_ports_is_counted_once_for_each_port() -> None:
    ports = (HTTP, Port("admin", 81))
    files = replace(ORDERS, ports=ports, endpoints=(endpoint("192.0.2.1"),))
    other = replace(ORDERS, ports=ports, endpoints=(endpoint("192.0.2.1", http=8080, admin=9090),))
    merged = only(mesh([Snapshot((files,)), registry(other)], {}).mesh)
    assert [dict(found.ports) for found in merged.endpoints] == [{"http": 8080}, {"admin": 9090}]


def test_a_service_that_only_a_registry_knows_takes_ports_from_instances_and_an_address_from_the_pool() -> None:
    unknown = Service("carts", "shop", endpoints=(endpoint("192.0.2.1", http=8080, queue=5672),))
    merged = mesh([Snapshot(), registry(unknown)], {})
    service = only(merged.mesh)
    assert service.ports == (Port("http", 8080, Protocol.HTTP), Port("queue", 5672, Protocol.TCP))
    assert dict(merged.given) == {("carts", "shop"): service.addresses[0]}
    again = mesh([Snapshot(), registry(unknown)], merged.given)
    assert (again.mesh, again.given) == (merged.mesh, merged.given)


def test_services_are_sorted_by_namespace_and_name() -> None:
    services = [Service("b", "x"), Service("a", "x"), Service("z", "default")]
    merged = mesh([Snapshot(tuple(services[:2])), registry(services[2])], {}).mesh
    assert [service.label for service in merged.services] == ["z", "a.x", "b.x"]


REFUSED = [
    ("127.0.0.1", 15001, True, "127.0.0.1:15001", "is Agent.spec.proxy.listen"),
    ("127.0.0.9", 15006, True, "127.0.0.9:15006", "is a port of meshbpf"),
    ("192.0.2.9", 15010, True, "192.0.2.9:15010", "is Agent.spec.registries.embedded.listen"),
    ("::1", 9100, True, "[::1]:9100", "is Agent.spec.admin.listen"),
    ("127.96.0.10", 80, True, "127.96.0.10:80", "is the address of service orders: name the servers behind it"),
    ("127.0.0.1", 8080, False, "127.0.0.1", "is on loopback and from a network registry: set allowLoopback to take it"),
    ("169.254.169.254", 80, True, "169.254.169.254", "is a metadata address of the platform"),
    ("fe80::1", 80, True, "fe80::1", "is a link-local address"),
    ("0.0.0.0", 80, True, "0.0.0.0", "is an unspecified address"),
    ("ff02::1", 80, True, "ff02::1", "is a multicast address"),
]  # fmt: skip


@pytest.mark.parametrize(("address", "number", "loopback", "what", "why"), REFUSED)
def test_an_endpoint_that_must_not_be_called_is_left_out_and_the_others_stay(
    address: str, number: int, loopback: bool, what: str, why: str
) -> None:
    agent = Agent(registries=(EmbeddedRegistry(listen="192.0.2.9:15010"),), admin=AdminSettings("0.0.0.0:9100"))
    other = replace(ORDERS, addresses=(), endpoints=(endpoint(address, number), endpoint("192.0.2.1")))
    merged = mesh([Snapshot((ORDERS,), agent=agent), registry(other, allow_loopback=loopback)], {})
    assert merged.problems == (Problem("orders", what, why),)
    assert [found.address for found in only(merged.mesh).endpoints] == ["192.0.2.1"]


def test_an_endpoint_at_an_address_that_the_pool_gave_is_left_out() -> None:
    pooled = Service("carts", ports=(HTTP,))
    address = only(mesh([Snapshot((pooled,))], {}).mesh).addresses[0]
    looping = replace(ORDERS, endpoints=(endpoint(address, 80), endpoint(address, 81)))
    merged = mesh([Snapshot((pooled,)), registry(looping)], {})
    assert [(problem.service, problem.what) for problem in merged.problems] == [("orders", f"{address}:80")]
    assert [dict(found.ports) for found in merged.mesh.services[1].endpoints] == [{"http": 81}]


def test_only_the_ports_that_the_service_has_are_taken_from_an_instance() -> None:
    other = replace(ORDERS, endpoints=(endpoint("192.0.2.1", http=8080, metrics=9090), endpoint("192.0.2.2", web=80)))
    merged = mesh([Snapshot((ORDERS,)), registry(other)], {})
    assert [(found.address, dict(found.ports)) for found in only(merged.mesh).endpoints] == [
        ("192.0.2.1", {"http": 8080})
    ]
    assert merged.problems == (
        Problem("orders", "192.0.2.1:9090", 'has port "metrics", which is not a port of the service (known: http)'),
        Problem("orders", "192.0.2.2:80", 'has port "web", which is not a port of the service (known: http)'),
    )


def test_udp_and_tcp_have_their_own_port_numbers() -> None:
    dns = Service("dns", addresses=("127.96.0.53",), ports=(Port("udp", 53, Protocol.UDP),))
    relay = Service("relay", ports=(Port("tcp", 53),), endpoints=(endpoint("127.96.0.53", tcp=53),))
    assert mesh([Snapshot((dns, relay))], {}).problems == ()


def test_a_udp_port_of_a_registry_is_not_carried_past_a_policy_that_wants_the_proxy() -> None:
    """In files it is refused. One message for the port, not one for every endpoint."""
    both = Service("dns", endpoints=(endpoint("192.0.2.1", udp=53, tcp=53), endpoint("192.0.2.2", udp=53)))
    governed = Snapshot(policies=(ServicePolicy("p", service="dns", mode=Mode.PROXY),))
    merger = Merger()
    for files in (governed, Snapshot(), governed):
        merged = merger.mesh([files, registry(both)], {})
        assert merged == mesh([files, registry(both)], {})
        found = only(merged.mesh)
        if files is governed:
            assert found.ports == (Port("tcp", 53, Protocol.TCP),)
            assert [(e.address, dict(e.ports)) for e in found.endpoints] == [("192.0.2.1", {"tcp": 53})]
            (problem,) = merged.problems
            assert (problem.service, problem.what) == ("dns", "port udp")
            assert problem.why.endswith("the service's policy has mode proxy: leave mode out")
        else:
            assert {port.name for port in found.ports} == {"tcp", "udp"}
            assert (len(found.endpoints), merged.problems) == (2, ())


def test_an_http_port_of_a_registry_is_not_carried_past_a_policy_that_chooses_by_client() -> None:
    """In files it is refused; no proxy chooses by client."""
    hashed = LoadBalancer(consistent_hash=ConsistentHash(use_source_ip=True))
    both = Service("web", endpoints=(endpoint("192.0.2.1", http=80, tcp=81),))
    merger = Merger()
    for mode, expected in ((Mode.AUTO, ["tcp"]), (Mode.DIRECT, ["http", "tcp"]), (Mode.PROXY, [])):
        files = Snapshot(policies=(ServicePolicy("p", service="web", mode=mode, load_balancer=hashed),))
        merged = merger.mesh([files, registry(both)], {})
        assert merged == mesh([files, registry(both)], {})
        assert sorted(port.name for port in only(merged.mesh).ports) == expected
        assert [problem.what for problem in merged.problems] == sorted(
            f"port {n}" for n in {"http", "tcp"} - {*expected}
        )
        for problem in merged.problems:
            assert problem.why.endswith("no loadBalancer.consistentHash yet: set mode: direct in the service's policy")


def test_an_address_that_two_services_want_stays_with_the_earlier_source_and_the_other_gets_one_from_the_pool() -> None:
    grabbing = Service("aaa", addresses=("127.96.0.10", "192.0.2.9", "127.0.0.1"), ports=(HTTP,), source="registry")
    alone = replace(grabbing, name="bbb", addresses=("127.96.0.10",))
    merged = mesh([Snapshot((ORDERS,)), registry(grabbing, alone)], {})
    assert merged.problems[:2] == (
        Problem("aaa", "127.96.0.10", "is the address of service orders at port 80"),
        Problem("bbb", "127.96.0.10", "is the address of service orders at port 80"),
    )
    aaa, bbb, orders = merged.mesh.services
    assert aaa.addresses == ("192.0.2.9", "127.0.0.1")
    assert orders.addresses == ("127.96.0.10",)
    assert bbb.addresses == (merged.given["bbb", "default"],) != ("127.96.0.10",)


def test_a_service_may_not_sit_on_our_own_listener() -> None:
    proxy = Service("proxy", addresses=("127.0.0.1",), ports=(Port("http", 15001),))
    merged = mesh([registry(proxy)], {})
    assert merged.problems == (Problem("proxy", "127.0.0.1", "is Agent.spec.proxy.listen at port 15001"),)


def test_given_addresses_stay_until_a_file_claims_them_and_that_is_told() -> None:
    carts = Service("carts", ports=(HTTP,))
    given = {("carts", "default"): "127.96.0.10", ("gone", "default"): "127.96.0.99"}
    assert only(mesh([Snapshot((carts,))], given).mesh).addresses == ("127.96.0.10",)
    merged = mesh([Snapshot((carts, ORDERS))], given)
    moved = merged.mesh.services[0].addresses[0]
    assert merged.problems == (Problem("carts", moved, "was 127.96.0.10, which the pool cannot give any more"),)
    assert dict(merged.given) == {("carts", "default"): moved, ("gone", "default"): "127.96.0.99"}


def test_a_full_pool_leaves_a_service_without_address_and_names_the_field() -> None:
    agent = Agent(address_pool="127.98.0.0/30")
    services = tuple(Service(name, ports=(HTTP,)) for name in ("a", "b", "c"))
    merged = mesh([Snapshot(services, agent=agent)], {})
    assert [len(service.addresses) for service in merged.mesh.services] == [1, 1, 0]
    assert [(problem.service, problem.what) for problem in merged.problems] == [("c", "address")]
    assert "Agent.spec.addressPool" in merged.problems[0].why


def test_what_a_store_is_asked_for() -> None:
    carts = Service("carts", "shop", ports=(HTTP,))
    asked = wanted([Snapshot((ORDERS,)), registry(carts)])
    assert asked.services == (("carts", "shop"),)
    assert (str(asked.pool), asked.avoid) == ("127.96.0.0/16", frozenset({"127.96.0.10"}))
    merged = mesh([Snapshot((ORDERS,)), registry(carts)], {("carts", "shop"): "127.96.7.7"})
    assert merged.mesh.services[1].addresses == ("127.96.7.7",)


def test_a_service_whose_address_or_port_changes_is_judged_with_all_others() -> None:
    """Its new address may be what an instance of another service names, and its old one is free."""
    files, merger = Snapshot((ORDERS,), source="files"), Merger()
    for addresses, number in ((("127.96.0.77",), 80), (("127.96.0.78",), 80), (("127.96.0.78",), 81)):
        carts = Service("carts", addresses=addresses, ports=(Port("http", number, Protocol.HTTP),))
        users = Service("users", endpoints=(Endpoint("127.96.0.78", {"http": 80}),))
        snapshots = [files, registry(carts, users)]
        assert merger.mesh(snapshots, {}) == mesh(snapshots, {})
        assert merger.wanted(snapshots) == wanted(snapshots)


@st.composite
def histories(draw: st.DrawFn) -> list[list[Snapshot]]:
    """What two sources say, again and again; mostly the same services with other endpoints."""
    found: list[list[Snapshot]] = []
    for _ in range(draw(st.integers(2, 5))):
        said = []
        for rank, name in enumerate(("files", "registry")):
            if found and draw(st.booleans()):
                said.append(found[-1][rank])
                continue
            services = found[-1][rank].services if found and draw(st.booleans()) else draw(meshes()).services
            services = tuple(
                replace(service, endpoints=tuple(draw(st.lists(endpoints, max_size=3))))
                if draw(st.booleans())
                else service
                for service in services
            )
            if rank and draw(st.booleans()):
                services = tuple(replace(service, addresses=(), ports=()) for service in services)
            governed = () if rank else tuple(draw(meshes()).policies.values())
            said.append(Snapshot(services, governed, source=name, allow_loopback=not rank or draw(st.booleans())))
        found.append(said)
    return found


@settings(max_examples=150, deadline=None)
@given(histories())
def test_merging_again_gives_what_merging_anew_gives(history: list[list[Snapshot]]) -> None:
    merger, held = Merger(), {("a", "default"): "127.96.0.9"}
    last: list[Snapshot] = []
    for number, snapshots in enumerate(history):
        again, anew = merger.mesh(snapshots, held, number), mesh(snapshots, held, number)
        assert again == anew
        assert merger.wanted(snapshots) == wanted(snapshots)
        if snapshots == last:
            before = merger.mesh(snapshots, held, number).mesh.services
            assert all(one is other for one, other in zip(before, again.mesh.services, strict=True))
        last, held = snapshots, dict(anew.given)
