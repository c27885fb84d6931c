"""What bpftool reads out of the pinned tables is what the plan wanted, and detach leaves nothing of it."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator

import pytest

from loader import abi, dataplane
from loader.plan import TABLES, Tables, plan
from meshbpf.errors import MapFull
from meshbpf.model import Endpoint, EndpointState, MapSizes, Mesh, Mode, OnProxyDown, Port, Protocol, Service
from meshbpf.model import ServicePolicy as Policy
from tests.support import bpftool
from tests.support.ground import AGENT, SIZES, Ground, Listener, mesh, reached, service

MANY = Mesh(
    AGENT,
    (
        Service(
            "carts",
            addresses=("127.96.2.1", "fd00:96::1"),
            ports=(Port("http", 80, Protocol.HTTP), Port("tcp", 9000, Protocol.TCP)),
            endpoints=(
                Endpoint("127.0.0.1", {"http": 8081, "tcp": 9001}, weight=300),
                Endpoint("fd00::7", {"http": 8082}, weight=100),
                Endpoint("127.0.0.3", {"http": 8083, "tcp": 9003}, weight=200, state=EndpointState.DRAINING),
                Endpoint("127.0.0.4", {"tcp": 9004}, weight=0),
            ),
        ),
        Service(
            "orders",
            addresses=("127.96.2.2",),
            ports=(Port("http", 80, Protocol.HTTP), Port("names", 53, Protocol.UDP)),
            endpoints=(Endpoint("127.0.0.1", {"http": 8081, "names": 53}, weight=1),),
        ),
        Service("users", addresses=("127.96.2.3",), ports=(Port("tls", 443, Protocol.TLS),)),
    ),
    {("orders", "default"): Policy(service="orders", mode=Mode.PROXY, on_proxy_down=OnProxyDown.REFUSE)},
)


@pytest.fixture
def ground() -> Iterator[Ground]:
    with Ground(f"tables-{os.getpid()}") as made:
        yield made


def held(ground: Ground) -> Tables:
    return Tables(**{name: bpftool.dump(ground.plane.maps_folder / name) for name in TABLES})


def test_the_kernel_holds_what_was_planned(ground: Ground) -> None:
    ground.attach(MANY)
    planned = plan(MANY, Tables())
    tables = held(ground)
    assert tables == planned.tables
    services = {}
    for key, value in tables.services.items():
        named = abi.ServiceKey.from_buffer_copy(key)
        service_id = abi.ServiceValue.from_buffer_copy(value).service_id
        services[abi.unpack_address(named.address), named.port, named.protocol] = service_id
    assert services == {
        ("127.96.2.1", 80, 6): 1, ("fd00:96::1", 80, 6): 1,
        ("127.96.2.1", 9000, 6): 2, ("fd00:96::1", 9000, 6): 2,
        ("127.96.2.2", 80, 6): 3, ("127.96.2.2", 53, 17): 4, ("127.96.2.3", 443, 6): 5,
    }  # fmt: skip
    policies = {int.from_bytes(k, "little"): abi.PolicyValue.from_buffer_copy(v) for k, v in tables.policies.items()}
    assert {i: (p.slots, p.slots4, p.carrier, p.on_proxy_down) for i, p in policies.items()} == {
        1: (4, 3, abi.Carried.PROXY, abi.Down.DIRECT),
        2: (1, 1, abi.Carried.DIRECT, abi.Down.DIRECT),
        3: (1, 1, abi.Carried.PROXY, abi.Down.REFUSE),
        4: (1, 1, abi.Carried.DIRECT, abi.Down.REFUSE),
        5: (0, 0, abi.Carried.DIRECT, abi.Down.DIRECT),
    }
    (raw,) = bpftool.dump(ground.plane.maps_folder / "agent").values()
    noted = abi.AgentState.from_buffer_copy(raw)
    assert (noted.next_service, noted.next_endpoint) == (planned.free.service, planned.free.endpoint)
    for name in ("rounds", "connections"):
        rows = bpftool.dump(ground.plane.maps_folder / name)
        assert {int.from_bytes(key, "little") for key in rows} == {1, 2, 3, 4, 5}


def test_a_changed_mesh_is_written_over_the_old_one(ground: Ground) -> None:
    ground.attach(MANY)
    before = held(ground)
    fewer = Mesh(AGENT, (MANY.services[1], service("new", "127.96.2.9", Endpoint("127.0.0.9", {"main": 1}))))
    applied = ground.plane.apply(fewer)
    assert held(ground) == applied.plan.tables == plan(fewer, before).tables
    assert {service.name for service, _port in applied.plan.service_ids.values()} == {"orders", "new"}
    assert ground.plane.apply(fewer).writes == 0
    rows = bpftool.dump(ground.plane.maps_folder / "rounds")
    assert {int.from_bytes(key, "little") for key in rows} == set(applied.plan.service_ids)


def test_detach_leaves_nothing(ground: Ground) -> None:
    ground.attach(MANY)
    ours = bpftool.pinned(ground.instance)
    assert len(ours.ids["link"]) >= len(dataplane.CGROUP_HOOKS)
    assert ours.alive() == {kind: set(ids) for kind, ids in ours.ids.items()}
    removed = dataplane.detach(ground.instance)
    assert sum(line.startswith("link") for line in removed) == len(dataplane.CGROUP_HOOKS)
    assert ours.gone()
    assert bpftool.on_cgroup(ground.cgroup) == []
    assert bpftool.hooks_on(ground.cgroup) == []
    assert not ground.instance.pins.exists()
    assert not ground.instance.run.exists()
    assert dataplane.detach(ground.instance) == []


def test_pins_and_files_are_for_root_alone(ground: Ground) -> None:
    ground.attach(MANY)
    for top in (ground.instance.pins, ground.instance.run):
        assert stat.S_IMODE(top.stat().st_mode) == 0o700
        for path in top.rglob("*"):
            wanted = 0o700 if path.is_dir() else 0o600
            assert stat.S_IMODE(path.stat().st_mode) == wanted, path
            assert path.stat().st_uid == 0


@pytest.mark.parametrize("field", ["services", "slots", "endpoints", "policies"])
def test_a_full_table_names_its_field_and_the_old_mesh_serves_on(ground: Ground, field: str) -> None:
    with Listener() as a, Listener() as b:
        sizes = MapSizes(**{"services": 8, "slots": 8, "endpoints": 8, "policies": 8, "flows": 16, "members": 16})
        ground.attach(mesh(service("orders", "127.96.2.1", a.endpoint()), sizes=sizes))
        before = held(ground)
        growing = [service(f"s{n}", f"127.96.3.{n}", Endpoint("127.0.0.1", {"main": 100 + n})) for n in range(1, 9)]
        if field == "slots":
            growing = [service("s", "127.96.3.1", *(Endpoint("127.0.0.9", {"main": 1}, weight) for weight in (4, 5)))]
        narrow = {f: 8 if f == field else 64 for f in ("services", "slots", "endpoints", "policies")}
        too_much = mesh(
            service("orders", "127.96.2.1", b.endpoint()), *growing, sizes=MapSizes(**narrow, flows=16, members=16)
        )
        with pytest.raises(MapFull, match=rf"raise Agent\.spec\.maps\.{field}"):
            ground.plane.apply(too_much)
        assert held(ground) == before
        with ground.connect("127.96.2.1"):
            assert reached(a, b) is a


def test_a_full_table_at_attach_leaves_what_ran(ground: Ground) -> None:
    """The new sizes need new tables; the old ones stay in use when those are too small."""
    with Listener() as a:
        ground.attach(mesh(service("orders", "127.96.2.1", a.endpoint())))
        tiny = MapSizes(services=1, slots=1, endpoints=1, policies=1, flows=16, members=16)
        two = [service("orders", "127.96.2.1", a.endpoint()), service("more", "127.96.2.2", a.endpoint())]
        with pytest.raises(MapFull):
            ground.attach(mesh(*two, sizes=tiny))
        with ground.connect("127.96.2.1"):
            assert reached(a) is a
        ground.attach(mesh(*two, sizes=SIZES))
        with ground.connect("127.96.2.2"):
            assert reached(a) is a
        assert [path.name for path in ground.instance.pins.glob("maps-*")] == [ground.plane.maps_folder.name]


def test_a_full_table_at_the_first_attach_leaves_nothing(ground: Ground) -> None:
    tiny = MapSizes(services=1, slots=1, endpoints=1, policies=1, flows=16, members=16)
    with pytest.raises(MapFull):
        ground.attach(mesh(*(service(f"s{n}", f"127.96.2.{n}") for n in (1, 2)), sizes=tiny))
    assert not ground.instance.pins.exists()
    assert not ground.instance.run.exists()
    assert bpftool.hooks_on(ground.cgroup) == []
