"""Writes in an order that leads nobody astray, checked by a connect() between every two of them."""

from __future__ import annotations

import copy
from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from loader.diff import diff
from loader.plan import Ids, Tables, plan
from meshbpf.model import Endpoint, EndpointState, Mesh, Port, Protocol, Service
from tests.support.meshes import ADDRESSES, connect, do, meshes, serving, unserved

DIALS = [(address, port, ":" not in address) for address in ADDRESSES for port in (80, 81)]


def check_every_moment(kernel: Tables, old: Mesh, new: Mesh) -> Ids:
    """Apply `new` over `old` write by write, connecting everywhere before, between and after."""
    planned = plan(new, kernel)
    writes = list(diff(kernel, planned.tables))
    for write in [None, *writes]:
        if write is not None:
            do(kernel, write)
        assert not unserved(kernel), f"taken for stranded after {write}"
        for address, port, ipv4_socket in DIALS:
            before, after = (serving(mesh, address, port, ipv4_socket) for mesh in (old, new))
            led = connect(kernel, address, port, ipv4_socket)
            told = f"{address}:{port} after {write}"
            if led is None:
                assert before is None or after is None, f"not led any more: {told}"
                continue
            assert before is not None or after is not None, f"led, and no service: {told}"
            assert led.to <= (before or frozenset()) | (after or frozenset()), f"astray: {told}"
            assert not led.retried, f"a slot was in vain: {told}"
            if before and after:
                assert not led.refused, f"found none: {told}"
    assert kernel == planned.tables
    return planned.free


@settings(max_examples=150, deadline=None)
@given(st.lists(meshes(), min_size=1, max_size=4))
def test_no_connect_is_led_astray_at_any_moment(several: list[Mesh]) -> None:
    kernel = Tables()
    for old, new in pairwise([Mesh(), *several]):
        check_every_moment(kernel, old, new)


@settings(max_examples=100, deadline=None)
@given(meshes(), meshes())
def test_equal_tables_give_no_write_and_each_key_is_written_no_more_than_needed(old: Mesh, new: Mesh) -> None:
    have = plan(old, Tables()).tables
    assert list(diff(have, copy.deepcopy(have))) == []
    writes = list(diff(have, plan(new, have).tables))
    seen = [(write.table, write.key) for write in writes if write.table != "policies"]
    assert len(seen) == len(set(seen))


def one(*endpoints: Endpoint, addresses: tuple[str, ...] = (ADDRESSES[0],), name: str = "a") -> Service:
    return Service(name, addresses=addresses, ports=(Port("main", 80, Protocol.TCP),), endpoints=endpoints)


def ready(host: str, weight: int = 1) -> Endpoint:
    return Endpoint(host, {"main": 1}, weight)


def test_an_endpoint_drains_after_the_slots_have_left_it() -> None:
    """More slots of it in a row than a connect tries."""
    first, second = ready("127.0.0.1", 50), ready("127.0.0.2", 1)
    draining = Endpoint("127.0.0.1", {"main": 1}, 50, state=EndpointState.DRAINING)
    old, new = Mesh(services=(one(first, second),)), Mesh(services=(one(draining, second),))
    kernel = Tables()
    check_every_moment(kernel, Mesh(), old)
    check_every_moment(kernel, old, new)


def test_an_address_that_moves_is_served_by_its_old_or_its_new_service() -> None:
    left, right = ready("127.0.0.1"), ready("127.0.0.2")
    old = Mesh(services=(one(left, addresses=(ADDRESSES[0], ADDRESSES[1]), name="b"),))
    new = Mesh(services=(one(right, addresses=(ADDRESSES[0],)), one(left, addresses=(ADDRESSES[1],), name="b")))
    kernel = Tables()
    check_every_moment(kernel, Mesh(), old)
    check_every_moment(kernel, old, new)


def test_ipv4_endpoints_give_way_to_ipv6_ones() -> None:
    old = Mesh(services=(one(*(ready(f"127.0.0.{n}") for n in range(1, 9))),))
    new = Mesh(services=(one(ready("127.0.0.8"), *(ready(f"fd00::{n}") for n in range(1, 9))),))
    for first, second in ((old, new), (new, old)):
        kernel = Tables()
        check_every_moment(kernel, Mesh(), first)
        check_every_moment(kernel, first, second)
