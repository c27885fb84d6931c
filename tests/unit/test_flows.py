"""The worker's short-hand for the flows table says what loader/abi.py says."""

from __future__ import annotations

import ctypes as ct

from loader import abi
from loader.flows import KEY, VALUE


def test_key_is_the_kernels() -> None:
    key = abi.FlowKey(7, abi.pack_address("127.0.0.1"), 4660)
    assert KEY.pack(7, bytes(abi.pack_address("127.0.0.1")), (4660).to_bytes(2, "big")) == bytes(key)
    assert KEY.size == ct.sizeof(abi.FlowKey)


def test_value_is_the_kernels() -> None:
    value = abi.FlowValue(cgroup=9, asked=abi.pack_address("fd00::1"), asked_port=443, service_id=3, pid=4)
    assert VALUE.unpack(bytes(value)) == (9, bytes(abi.pack_address("fd00::1")), (443).to_bytes(2, "big"), 3, 4)
    assert VALUE.size == ct.sizeof(abi.FlowValue)
