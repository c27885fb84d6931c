"""Layouts that C and Python share: addresses, byte order, and a digest that notices every change."""

from __future__ import annotations

import ctypes as ct
import dataclasses
import ipaddress
from enum import IntEnum

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loader import abi
from loader.dataplane import SHAPES
from meshbpf.model import MapSizes


@given(st.ip_addresses())
def test_addresses_come_back(address: ipaddress.IPv4Address | ipaddress.IPv6Address) -> None:
    mapped = address.ipv4_mapped if address.version == 6 else None
    packed = abi.pack_address(str(address))
    assert len(bytes(packed)) == 16
    assert abi.unpack_address(packed) == str(mapped or address)


def test_both_families_have_one_form() -> None:
    assert bytes(abi.pack_address("127.0.0.1")) == bytes(10) + b"\xff\xff\x7f\0\0\1"
    assert bytes(abi.pack_address("::ffff:127.0.0.1")) == bytes(abi.pack_address("127.0.0.1"))


@pytest.mark.parametrize("text", ["", "localhost", "127.0.0.1:80", "fe80::1/64", "1.2.3"])
def test_what_is_no_address_is_refused(text: str) -> None:
    with pytest.raises(ValueError):
        abi.pack_address(text)


def test_ports_are_in_network_order() -> None:
    assert bytes(abi.ServiceKey(abi.pack_address("::1"), 80, 6))[16:] == b"\0P\6\0"
    assert bytes(abi.AgentState(proxy_port=15001))[16:18] == (15001).to_bytes(2, "big")


def test_every_pad_is_last_or_between_and_starts_as_zero() -> None:
    """Keys are compared byte by byte by the kernel."""
    for struct in abi.STRUCTS:
        assert bytes(struct()) == bytes(ct.sizeof(struct))


@pytest.mark.parametrize(
    ("table", "key", "value"),
    [
        ("services", abi.ServiceKey, abi.ServiceValue),
        ("policies", abi.u32, abi.PolicyValue),
        ("slots", abi.SlotKey, abi.SlotValue),
        ("endpoints", abi.u32, abi.EndpointValue),
        ("rounds", abi.u32, abi.u64),
        ("agent", abi.u32, abi.AgentState),
        ("heartbeat", abi.u32, abi.u64),
        ("flows", abi.FlowKey, abi.FlowValue),
        ("connections", abi.u32, abi.ConnectionCount),
        ("affinities", abi.AffinityKey, abi.Affinity),
        ("limits", abi.u32, abi.u64),
        ("counters", abi.u32, abi.u64),
    ],
)
def test_the_loader_opens_tables_with_these_sizes(table: str, key: type, value: type) -> None:
    assert SHAPES[table][:2] == (ct.sizeof(key), ct.sizeof(value))


def test_the_layout_is_stable_and_notices_sizes() -> None:
    sizes = MapSizes()
    digest = abi.layout(sizes)
    assert digest == abi.layout(MapSizes())
    assert len(digest) == 12
    for field in dataclasses.fields(sizes):
        assert abi.layout(dataclasses.replace(sizes, **{field.name: 7})) != digest, field.name


def test_the_layout_notices_a_changed_struct_enum_or_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    digest = abi.layout(MapSizes())

    class SlotValue(ct.Structure):
        _fields_ = [("endpoint", abi.u32)]

    class Pick(IntEnum):
        ROUND_ROBIN = 2
        RANDOM = 1

    changes: list[tuple[str, object]] = [
        ("STRUCTS", tuple(SlotValue if s is abi.SlotValue else s for s in abi.STRUCTS)),
        ("ENUMS", tuple(Pick if e is abi.Pick else e for e in abi.ENUMS)),
        ("CONSTANTS", {**abi.CONSTANTS, "PICK_TRIES": 5}),
    ]
    for name, changed in changes:
        with monkeypatch.context() as patched:
            patched.setattr(abi, name, changed)
            assert abi.layout(MapSizes()) != digest, name
