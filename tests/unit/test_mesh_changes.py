"""Which services changed, and that whoever remembers something of the others says what he would say without."""

from __future__ import annotations

from dataclasses import replace

from meshbpf import changes
from meshbpf.model import Endpoint, MapSizes, Mesh, Mode, Port, Protocol, Service, ServicePolicy
from meshbpf.runtime.about import Audience
from meshbpf.runtime.room import MAX_SLOTS, Fitter

TCP, HTTP = (Port("main", 80),), (Port("main", 80, Protocol.HTTP),)
A, B, C = (Service(name, addresses=(f"127.96.0.{n}",), ports=TCP) for n, name in enumerate("abc", 1))


def endpoints(service: Service, count: int, ports: tuple[Port, ...] = TCP) -> Service:
    found = tuple(Endpoint(f"10.0.{n >> 8}.{n & 255}", {"main": 80}) for n in range(count))
    return replace(service, endpoints=found, ports=ports)


def governed(*services: Service, mode: Mode) -> Mesh:
    return Mesh(services=services, policies={s.id: ServicePolicy(service=s.name, mode=mode) for s in services})


def test_a_changed_service_is_known_by_its_place() -> None:
    before = Mesh(services=(A, B, C))
    assert changes.places(before, replace(before, generation=2)) == []
    assert changes.places(before, Mesh(services=(A, replace(B, labels={"a": "b"}), replace(C)))) == [1, 2]


def test_that_is_not_all_where_services_come_go_or_move_or_policies_change() -> None:
    before = Mesh(services=(A, B))
    for services in ((A,), (A, B, C), (A, C), (B, A)):
        assert changes.places(before, Mesh(services=services)) is None
    assert changes.places(before, governed(A, B, mode=Mode.DIRECT)) is None


HISTORY = (
    Mesh(services=(endpoints(A, 1), B)),
    Mesh(services=(endpoints(A, 2), B)),
    Mesh(services=(endpoints(A, 3), endpoints(B, 3))),  # too much for the sizes below
    Mesh(services=(endpoints(A, 3), B)),
    Mesh(services=(endpoints(A, 1), B, endpoints(C, 3, HTTP))),
    Mesh(services=(endpoints(A, 1, HTTP), B, C)),
    governed(endpoints(A, 1, HTTP), B, endpoints(C, 3, HTTP), mode=Mode.DIRECT),
    governed(endpoints(A, 1), B, mode=Mode.PROXY),
    Mesh(services=(endpoints(A, MAX_SLOTS + 1), B)),
)


def test_what_fits_is_what_fits_without_a_past() -> None:
    fitter, sizes = Fitter(), MapSizes(services=3, policies=3, slots=5, endpoints=5)
    for mesh in HISTORY:
        for room in (sizes, MapSizes()):
            assert fitter.fit(mesh, (), room, "files") == Fitter().fit(mesh, (), room, "files")


def test_workers_are_told_what_they_would_be_told_without_a_past_and_what_they_know() -> None:
    audience, known = Audience(everything=False), set[str]()
    for mesh in HISTORY:
        fresh = {service.name for service in Audience(everything=False).part(mesh).services}
        known = (known & {service.name for service in mesh.services}) | fresh
        assert {service.name for service in audience.part(mesh).services} == known
