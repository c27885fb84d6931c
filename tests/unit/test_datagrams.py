"""Which endpoints UDP sockets may talk to, and which sockets lost theirs."""

from __future__ import annotations

from typing import cast

import pytest

from loader import abi, libbpf
from loader.datagrams import stranded
from loader.plan import Plan, Tables, plan
from meshbpf.model import Endpoint, EndpointState, Mesh, Port, Protocol, Service


class Rows(dict[bytes, bytes]):
    """Stands for a map."""

    def lookup(self, key: bytes) -> bytes | None:
        return self.get(key)


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
    assert planned.tables.serving.keys() == {pair(1, 1), pair(1, 2), pair(1, 3)}


@pytest.mark.parametrize(
    ("service", "endpoint_there", "serves", "lost"),
    [(True, True, True, False), (True, True, False, True), (False, True, False, False), (False, False, False, True)],
)
def test_who_lost_its_endpoint(service: bool, endpoint_there: bool, serves: bool, lost: bool) -> None:
    socket = abi.Connected(7, abi.pack_address("127.0.0.1"), 53, service_id=1, endpoint_id=2, pid=4711)
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
