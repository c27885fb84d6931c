"""Tables that are too small: who is left out, and who never is."""

from __future__ import annotations

from dataclasses import replace

from loader.plan import Tables, plan
from meshbpf.model import (
    Agent,
    ConsistentHash,
    Endpoint,
    LoadBalancer,
    Maglev,
    MapSizes,
    Mesh,
    Port,
    Protocol,
    Service,
    ServicePolicy,
)
from meshbpf.runtime.room import MAX_SLOTS, Fitter, fit

TCP = (Port("tcp", 80, Protocol.TCP),)


def service(name: str, number: int, endpoints: int, source: str = "registry", weight: int = 1) -> Service:
    hosts = tuple(
        Endpoint(f"10.{number}.{n >> 8}.{n & 255}", {"tcp": 80}, weight if n else 1, source=source)
        for n in range(endpoints)
    )
    return Service(name, addresses=(f"127.96.0.{number}",), ports=TCP, endpoints=hosts)


def test_only_what_does_not_fit_is_left_out() -> None:
    ours, greedy, small = service("ours", 1, 2, "files"), service("greedy", 2, 9), service("small", 3, 2)
    mesh = Mesh(Agent(maps=MapSizes(slots=5)), (greedy, ours, small))
    fitted, problems = fit(mesh, {ours.id}, mesh.agent.maps)
    assert fitted.services == (ours, small)
    assert [problem.service for problem in problems] == [greedy.label]
    assert "Agent.spec.maps.slots" in problems[0].why
    plan(fitted, Tables())


def test_each_udp_service_has_its_endpoints_for_itself() -> None:
    ports = (Port("udp", 53, Protocol.UDP),)
    hosts = tuple(Endpoint(f"10.0.0.{n}", {"udp": 53}, source="registry") for n in range(3))
    first, second = (Service(n, addresses=(f"127.96.0.{i}",), ports=ports, endpoints=hosts) for i, n in enumerate("ab"))
    mesh = Mesh(Agent(maps=MapSizes(endpoints=5)), (first, second))
    fitted, problems = fit(mesh, set(), mesh.agent.maps)
    assert fitted.services == (first,)
    assert [problem.why for problem in problems] == ["does not fit into map serving: raise Agent.spec.maps.endpoints"]
    plan(fitted, Tables())
    assert Fitter().fit(mesh, (), mesh.agent.maps, "files") == (fitted, problems)
    exact = replace(mesh, agent=Agent(maps=MapSizes(endpoints=6)))
    assert fit(exact, set(), exact.agent.maps) == (exact, [])
    plan(exact, Tables())


def test_a_table_takes_what_its_policy_says_and_no_registry_is_blamed_for_it() -> None:
    ours = service("ours", 1, 2)
    large = ServicePolicy(load_balancer=LoadBalancer(consistent_hash=ConsistentHash(True, Maglev(16_381))))
    mesh = Mesh(services=(ours,), policies={ours.id: large})
    fitter = Fitter()
    for slots, fits in ((16_381, True), (16_380, False)):
        sizes = MapSizes(slots=slots)
        fitted, problems = fit(mesh, set(), sizes)
        assert (bool(fitted.services), bool(problems)) == (fits, not fits)
        assert fitter.fit(mesh, (), sizes, "files") == (fitted, problems)
        assert len(plan(fitted, Tables()).tables.slots) == (16_381 if fits else 0)
    assert fitter.fit(Mesh(services=(ours,)), (), sizes, "files")[1] == []  # the same service, another policy
    six = replace(ours.endpoints[0], address="fd00::1")
    both = replace(mesh, services=(replace(ours, endpoints=(*ours.endpoints, six)),))
    assert fit(both, set(), MapSizes(slots=3 * 16_381))[1] == []
    assert fit(both, set(), MapSizes(slots=3 * 16_381 - 1))[1] != []
    assert len(plan(both, Tables()).tables.slots) == 3 * 16_381


def test_files_keep_their_endpoints_when_a_registry_adds_too_many() -> None:
    ours, theirs = service("ours", 1, 2, "files"), service("ours", 9, 9)
    both = Service("ours", addresses=ours.addresses, ports=TCP, endpoints=(*ours.endpoints, *theirs.endpoints))
    for name in ("slots", "endpoints"):
        sizes = MapSizes(**{name: 5})
        fitted, problems = fit(Mesh(services=(both,)), {both.id}, sizes)
        assert fitted.services == (ours,)
        assert len(problems) == 1
    exact = MapSizes(slots=11, endpoints=11, services=1, policies=1)
    assert fit(Mesh(services=(both,)), {both.id}, exact) == (Mesh(services=(both,)), [])


def test_files_alone_are_refused_as_a_whole_elsewhere() -> None:
    mesh = Mesh(services=(service("ours", 1, 9, "files"),))
    assert fit(mesh, {mesh.services[0].id}, MapSizes(slots=5)) == (mesh, [])


def test_no_service_of_a_registry_takes_all_slots() -> None:
    hog = service("hog", 1, MAX_SLOTS // 100 + 2, weight=100)
    fitted, problems = fit(Mesh(services=(hog,)), set(), MapSizes(slots=10 * MAX_SLOTS))
    assert (fitted.services, len(problems)) == ((), 1)


def test_endpoints_of_files_are_known_by_their_places() -> None:
    ours = service("ours", 1, 9, "mesh.yaml:8:9")
    mesh = Mesh(services=(ours,))
    assert fit(mesh, {ours.id}, MapSizes(slots=5), {"mesh.yaml:8:9", "files"}) == (mesh, [])
