"""Numbers of earlier tables as those of ours, and what a carried socket's answers are shown as."""

from __future__ import annotations

import pytest

from loader import abi
from loader.carry import CARRIED, Numbers, numbers, shown_as
from loader.plan import Ids, Tables, plan
from meshbpf.model import Endpoint, Mesh, Port, Protocol, Service

FOUR, ALSO_FOUR, SIX = "127.96.0.1", "127.96.0.2", "fd00:96::1"


def dns(name: str, addresses: tuple[str, ...], *hosts: str) -> Service:
    ends = tuple(Endpoint(host, {"main": 53}) for host in hosts)
    return Service(name, addresses=addresses, ports=(Port("main", 53, Protocol.UDP),), endpoints=ends)


def tables(*services: Service, free: Ids | None = None) -> dict[str, dict[bytes, bytes]]:
    made = plan(Mesh(services=services), Tables(), free or Ids()).tables
    return {"services": made.services, "endpoints": made.endpoints}


def number(found: dict[bytes, bytes], address: str) -> int:
    """Of the service with this address, or of the endpoint."""
    packed = bytes(abi.pack_address(address))
    by_address = {key[:16]: value for key, value in found.items()} | {v[:16]: k for k, v in found.items()}
    return int.from_bytes(by_address[packed], "little")


def test_numbers_follow_addresses() -> None:
    earlier = tables(dns("a", (ALSO_FOUR,), "127.0.0.9"), dns("dns", (FOUR,), "127.0.0.1", "127.0.0.2"))
    ours = tables(dns("dns", (FOUR,), "127.0.0.2", "127.0.0.3"), free=Ids(70, 80))
    to = numbers(earlier, ours)
    assert to.services == {number(earlier["services"], FOUR): number(ours["services"], FOUR)}
    assert {old: new for old, new in to.endpoints.items() if new} == {
        number(earlier["endpoints"], "127.0.0.2"): number(ours["endpoints"], "127.0.0.2")
    }
    assert len(to.endpoints) == 3, "those that left are nobody"


def test_every_number_of_a_row_is_carried() -> None:
    to = Numbers({1: 11}, {2: 22}, {})
    key, value = CARRIED["talks"](to, b"k", bytes(abi.Talk(service_id=1, endpoint_id=2, patience=3, sent=4)))
    talk = abi.Talk.from_buffer_copy(value)
    assert (key, talk.service_id, talk.endpoint_id, talk.patience, talk.sent) == (b"k", 11, 22, 3, 4)
    key, value = CARRIED["connected"](to, b"k", bytes(abi.Connected(service_id=1, endpoint_id=7, pid=5)))
    row = abi.Connected.from_buffer_copy(value)
    assert (key, row.service_id, row.endpoint_id, row.pid, row.carried) == (b"k", 11, 0, 5, 1)
    key, value = CARRIED["affinities"](to, bytes(abi.AffinityKey(service_id=1)), bytes(abi.Affinity(6, 2)))
    assert abi.AffinityKey.from_buffer_copy(key).service_id == 11
    assert (abi.Affinity.from_buffer_copy(value).endpoint_id, abi.Affinity.from_buffer_copy(value).used) == (22, 6)


@pytest.mark.parametrize(
    ("addresses", "given", "shown"),
    [
        ((FOUR,), "127.0.0.1", FOUR),
        ((FOUR, SIX), "127.0.0.1", FOUR),
        ((FOUR, SIX), "::1", SIX),
        ((SIX,), "127.0.0.1", SIX),
        ((FOUR, ALSO_FOUR), "127.0.0.1", None),
    ],
)
def test_answers_are_shown_as_what_was_dialled(addresses: tuple[str, ...], given: str, shown: str | None) -> None:
    found = tables(dns("dns", addresses, given))
    to = numbers(found, found)
    row = abi.Connected(
        given=abi.pack_address(given), given_port=53, service_id=number(found["services"], addresses[0])
    )
    made = shown_as(to, (9).to_bytes(8, "little"), bytes(row))
    if shown is None:
        assert made is None
    else:
        assert made is not None
        key, asked = abi.TalkKey.from_buffer_copy(made[0]), abi.Asked.from_buffer_copy(made[1])
        assert (key.cookie, abi.unpack_address(key.address), key.port) == (9, given, 53)
        assert (abi.unpack_address(asked.address), asked.port) == (shown, 53)
