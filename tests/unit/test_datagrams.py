"""Which endpoints UDP sockets may talk to, which sockets lost theirs, and a table that never says less than it must."""

from __future__ import annotations

from typing import cast

import pytest

from loader import abi, libbpf
from loader.datagrams import Serving, serving, stranded
from loader.plan import Plan, Tables, plan
from meshbpf.errors import MapFull
from meshbpf.model import Endpoint, EndpointState, Mesh, Port, Protocol, Service


class Rows(dict[bytes, bytes]):
    """Stands for a map of `size` rows."""

    size = 4

    def lookup(self, key: bytes) -> bytes | None:
        return self.get(key)

    def update(self, key: bytes, value: bytes) -> None:  # type: ignore[override]
        if key not in self and len(self) == self.size:
            raise MapFull("serving", self.size)
        self[key] = value

    def delete(self, key: bytes) -> None:
        del self[key]


def dns(*endpoints: Endpoint) -> Plan:
    ports = (Port("dns", 53, Protocol.UDP), Port("tcp", 53, Protocol.TCP))
    service = Service("dns", addresses=("127.96.0.53",), ports=ports, endpoints=endpoints)
    return plan(Mesh(services=(service,)), Tables())


def endpoint(number: int, **more: object) -> Endpoint:
    return Endpoint(f"127.0.0.{number}", {"dns": 53, "tcp": 53}, **more)  # type: ignore[arg-type]


def pair(service_id: int, endpoint_id: int) -> bytes:
    return bytes(abi.ServingKey(service_id, endpoint_id))


def test_every_endpoint_of_a_udp_port_serves_whatever_its_state_and_weight() -> None:
    planned = dns(endpoint(1), endpoint(2, weight=0), endpoint(3, state=EndpointState.DRAINING), Endpoint("::1", {}))
    assert serving(planned) == {pair(1, 1), pair(1, 2), pair(1, 3)}


def table(rows: Rows) -> Serving:
    return Serving(cast(libbpf.Map, rows))


def test_who_comes_is_in_before_and_who_goes_leaves_after() -> None:
    rows = Rows({b"gone": b"1", b"stays": b"1"})
    changing = table(rows)
    changing.add({b"stays", b"new"})
    assert set(rows) == {b"gone", b"stays", b"new"}
    assert changing.remove({b"stays", b"new"})
    assert set(rows) == {b"stays", b"new"}
    changing.add({b"stays", b"new"})
    assert not changing.remove({b"stays", b"new"})


def test_a_full_table_names_the_field_to_raise_and_is_read_again() -> None:
    rows = Rows({bytes([number]): b"1" for number in range(4)})
    changing = table(rows)
    with pytest.raises(MapFull, match=r"map endpoints is full at 4 entries: raise Agent\.spec\.maps\.endpoints"):
        changing.add({bytes([number]) for number in range(5)})
    changing.add({bytes([0]), bytes([1])})
    assert changing.remove({bytes([0]), bytes([1])})
    assert set(rows) == {bytes([0]), bytes([1])}


@pytest.mark.parametrize(
    ("service", "endpoint_there", "serves", "lost"),
    [(True, True, True, False), (True, True, False, True), (False, True, False, False), (False, False, False, True)],
)
def test_who_lost_its_endpoint(service: bool, endpoint_there: bool, serves: bool, lost: bool) -> None:
    socket = abi.Connected(7, abi.pack_address("127.0.0.1"), 53, 0, 1, 2, 4711)
    maps = {
        "connected": Rows({(99).to_bytes(8, "little"): bytes(socket)}),
        "policies": Rows({(1).to_bytes(4, "little"): b""} if service else {}),
        "endpoints": Rows({(2).to_bytes(4, "little"): b""} if endpoint_there else {}),
        "serving": Rows({pair(1, 2): b""} if serves else {}),
    }
    found = stranded(cast(dict[str, libbpf.Map], maps))
    assert {cookie: (row.netns, row.given_port, row.pid) for cookie, row in found.items()} == (
        {99: (7, 53, 4711)} if lost else {}
    )
