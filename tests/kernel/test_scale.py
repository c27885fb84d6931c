"""Ten thousand services with ten endpoints each in the kernel's tables: every entry, loaded and after changes."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import replace

import pytest

from bench import crowd
from loader import abi
from loader.plan import TABLES, Tables
from meshbpf.model import Endpoint, Mesh, Service
from tests.support import bpftool
from tests.support.ground import Ground

SERVICES = 10_000


@pytest.fixture
def ground() -> Iterator[Ground]:
    with Ground(f"scale-{os.getpid()}") as made:
        yield made


def check_every_entry(tables: Tables, services: tuple[Service, ...]) -> None:
    """Each address leads to all endpoints of its service, once each, and nothing else is there."""
    ids = set()
    for service in services:
        (address,) = service.addresses
        raw = tables.services[bytes(abi.ServiceKey(abi.pack_address(address), 80, 6))]
        policy = abi.PolicyValue.from_buffer_copy(tables.policies[raw])
        assert (policy.slots, policy.slots4) == (len(service.endpoints),) * 2
        slots = [bytes(abi.SlotKey(int.from_bytes(raw, "little"), index)) for index in range(policy.slots)]
        found = {tables.endpoints[tables.slots[slot]] for slot in slots}
        assert found == {bytes(abi.EndpointValue(abi.pack_address(e.address), 8080)) for e in service.endpoints}
        ids.add(raw)
    hosts = {endpoint.address for service in services for endpoint in service.endpoints}
    slots = sum(len(service.endpoints) for service in services)
    assert len(ids) == len(tables.services) == len(tables.policies) == len(services)
    assert (len(tables.slots), len(tables.endpoints)) == (slots, len(hosts))


def test_every_entry_is_there_after_loading_and_after_a_change(ground: Ground) -> None:
    services = crowd.services(SERVICES)
    ground.attach(Mesh())
    plane = ground.plane
    assert plane.apply(Mesh(services=services)).writes == 2 * SERVICES + 2 * SERVICES * crowd.ENDPOINTS
    assert all(plane.maps[name]._batched for name in TABLES), "this kernel knows batches, so they must have been used"
    tables = Tables(**{name: bpftool.dump(plane.maps_folder / name) for name in TABLES})
    check_every_entry(tables, services)
    assert plane.read_tables() == tables, "our own reader, which reads in batches, sees the same"

    changed = list(services)
    moved = (Endpoint("127.120.0.1", {"main": 8080}), *services[7].endpoints[1:])
    changed[7] = replace(services[7], endpoints=moved)
    assert plane.apply(Mesh(services=tuple(changed))).writes == 3
    check_every_entry(plane.read_tables(), tuple(changed))

    assert plane.apply(Mesh(services=tuple(changed[:5]))).writes > 0
    check_every_entry(plane.read_tables(), tuple(changed[:5]))
    assert len(list(plane.maps["rounds"].keys())) == len(plane.connections()) == 5
