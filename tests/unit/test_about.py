"""What workers are told of a mesh: all of it or what changed, and that both come to the same."""

from __future__ import annotations

import asyncio
import json
from dataclasses import replace
from typing import Any, cast

import pytest

from loader.instance import Instance
from meshbpf import wire
from meshbpf.model import Endpoint, Mesh, Mode, Port, Protocol, Service, ServicePolicy
from meshbpf.runtime import about
from meshbpf.runtime.channel import Channel
from meshbpf.runtime.supervisor import Handle, Supervisor

SERVICES = tuple(
    Service(
        f"s{n}",
        addresses=(f"127.96.0.{n}",),
        ports=(Port("main", 80),),
        endpoints=(Endpoint("127.0.0.1", {"main": n}),),
    )
    for n in range(1, 5)
)
FIRST = Mesh(services=SERVICES, generation=1)
MOVED = replace(SERVICES[2], endpoints=(Endpoint("127.0.0.2", {"main": 3}),))
SECOND = replace(FIRST, services=(*SERVICES[:2], MOVED, SERVICES[3]), generation=2)


def change(last: Mesh, mesh: Mesh) -> dict[str, Any]:
    packed = about.pack_change(last, mesh, {"redirect": True})
    assert packed is not None
    told: dict[str, Any] = json.loads(packed)
    return told


def test_a_change_names_only_what_changed_and_ends_with_the_same_mesh() -> None:
    reader = about.Reader()
    first = reader.mesh(json.loads(about.pack(FIRST, {})))
    told = change(FIRST, SECOND)
    assert (list(told["changed"]), told["base"], told["redirect"]) == (["2"], 1, True)
    second = reader.mesh(told)
    assert (first, second) == (FIRST, SECOND)
    assert [one is other for one, other in zip(first.services, second.services, strict=True)] == [
        True,
        True,
        False,
        True,
    ]
    again = reader.mesh(json.loads(about.pack(replace(SECOND, generation=3), {})))
    assert all(one is other for one, other in zip(second.services, again.services, strict=True))


def test_a_change_of_another_mesh_than_the_last_one_is_refused() -> None:
    with pytest.raises(ValueError, match="change of generation 1, but 0 is the last one"):
        about.Reader().mesh(change(FIRST, SECOND))


@pytest.mark.parametrize(
    "mesh",
    [
        replace(FIRST, services=SERVICES[:3]),
        replace(FIRST, services=SERVICES[::-1]),
        replace(FIRST, policies={("s1", "default"): ServicePolicy(service="s1")}),
    ],
)
def test_more_than_some_services_is_told_as_a_whole(mesh: Mesh) -> None:
    assert about.pack_change(FIRST, mesh, {}) is None


def test_the_text_of_a_mesh_is_its_json() -> None:
    for mesh in (FIRST, SECOND, Mesh(), FIRST):
        assert wire.decode(Mesh, json.loads(wire.text(mesh))) == mesh


def led(*protocols: Protocol) -> Service:
    return Service("led", ports=tuple(Port(f"p{n}", n + 1, p) for n, p in enumerate(protocols)))


def test_workers_are_told_of_what_may_be_led_to_them() -> None:
    def told(service: Service, mode: Mode = Mode.AUTO) -> bool:
        policies = {service.id: ServicePolicy(service=service.name, mode=mode)}
        return bool(about.Audience(everything=False).part(Mesh(services=(service,), policies=policies)).services)

    assert told(led(Protocol.TCP, Protocol.HTTP))
    assert told(led(Protocol.GRPC), Mode.PROXY)
    assert not told(led(Protocol.HTTP), Mode.DIRECT)
    assert not told(led(Protocol.TCP, Protocol.GRPC, Protocol.UDP))
    assert not told(led(Protocol.UDP), Mode.PROXY)


def test_what_workers_know_they_go_on_knowing_while_it_is_in_the_mesh() -> None:
    service, audience = led(Protocol.HTTP), about.Audience(everything=False)
    direct = {service.id: ServicePolicy(service="led", mode=Mode.DIRECT)}
    for mesh, known in (
        (Mesh(services=(service,), policies=direct), False),
        (Mesh(services=(service,)), True),
        (Mesh(services=(service,), policies=direct), True),
        (Mesh(services=(replace(service, labels={"a": "b"}),), policies=direct), True),
        (Mesh(), False),
        (Mesh(services=(service,), policies=direct), False),
    ):
        assert audience.part(mesh) == (mesh if known else replace(mesh, services=()))


def test_after_an_earlier_agent_workers_are_told_everything() -> None:
    assert about.Audience(everything=True).part(FIRST) is FIRST


class Said:
    def __init__(self) -> None:
        self.blobs: list[object] = []

    def send(self, _message: dict[str, Any], _fds: object = (), blob: object = None) -> None:
        self.blobs.append(blob)


def test_only_who_has_the_mesh_before_is_told_the_change() -> None:
    supervisor = Supervisor(Instance("unit"), {}, lambda *_: None, lambda: None)
    up_to_date, behind = Said(), Said()
    for number, (said, told) in enumerate(((up_to_date, 1), (behind, -1))):
        process = cast(asyncio.subprocess.Process, None)
        supervisor._handles[number] = Handle(number, process, channel=cast(Channel, said), told=told)
    supervisor.use(2, lambda: b"whole", b"change", 1)
    assert (up_to_date.blobs, behind.blobs) == ([b"change"], [b"whole"])
    supervisor.use(3, lambda: b"whole", b"change", 2)
    assert (up_to_date.blobs, behind.blobs) == ([b"change"] * 2, [b"whole", b"change"])
    supervisor._handles[0].told = -1  # it has refused
    supervisor.use(4, lambda: b"whole", b"change", 3)
    assert (up_to_date.blobs[-1], behind.blobs[-1]) == (b"whole", b"change")


def test_who_was_foretold_a_mesh_is_told_only_to_use_it() -> None:
    supervisor, said = Supervisor(Instance("unit"), {}, lambda *_: None, lambda: None), Said()
    supervisor._handles[0] = Handle(0, cast(asyncio.subprocess.Process, None), channel=cast(Channel, said))
    supervisor.foretell(1, about.pack(FIRST, {}))
    packed = about.pack_change(FIRST, FIRST, {"layout": "made"})
    supervisor.use(1, bytes, packed, 1)
    foretold, used = (json.loads(cast(bytes, blob)) for blob in said.blobs)
    reader = about.Reader()
    assert reader.mesh(foretold) == reader.mesh(used) == FIRST
    assert (used["changed"], used["layout"]) == ({}, "made")
