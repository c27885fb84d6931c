"""Errors of the kernel become ours once; no kernel object is needed for that."""

from __future__ import annotations

import ctypes as ct
import errno
from pathlib import Path
from typing import Any

import pytest

from loader import libbpf
from meshbpf.errors import DataplaneError, EnvironmentLack, MapFull


class Kernel:
    """A library whose map calls fail with `number`, or hand out `keys`."""

    def __init__(self, number: int = 0, keys: tuple[bytes, ...] = ()) -> None:
        self.number = number
        self.keys = keys

    def _answer(self, *_arguments: Any) -> int:
        ct.set_errno(self.number)
        return -1 if self.number else 0

    bpf_map_lookup_elem = bpf_map_update_elem = bpf_map_delete_elem = _answer

    def bpf_map_get_next_key(self, _fd: int, key: bytes | None, following: Any) -> int:
        at = 0 if key is None else self.keys.index(key) + 1
        if at == len(self.keys):
            return -errno.ENOENT
        following.raw = self.keys[at]
        return 0


class Hash(Kernel):
    """Holds rows of four and four bytes; `batches` False: as kernels before 5.6 answer; no row after `room` of them."""

    def __init__(self, batches: bool = True, room: int = 1000) -> None:
        super().__init__()
        self.rows: dict[bytes, bytes] = {}
        self.batches, self.room, self.calls = batches, room, 0

    def _fails(self, number: int) -> int:
        ct.set_errno(number)
        return -number

    def bpf_map_update_elem(self, _fd: int, key: bytes, value: bytes, _flags: Any) -> int:
        self.calls += 1
        if key not in self.rows and len(self.rows) == self.room:
            return self._fails(errno.E2BIG)
        self.rows[key] = value
        return 0

    def bpf_map_delete_elem(self, _fd: int, key: bytes) -> int:
        self.calls += 1
        return self._fails(errno.ENOENT) if self.rows.pop(key, None) is None else 0

    def _batch(self, count: Any, one: Any) -> int:
        if not self.batches:
            return self._fails(errno.EINVAL)
        before, asked = self.calls, count._obj.value
        for count._obj.value in range(asked):
            if failed := one(4 * count._obj.value):
                break
        else:
            failed, count._obj.value = 0, asked
        self.calls = before + 1
        return failed

    def bpf_map_update_batch(self, fd: int, keys: bytes, values: bytes, count: Any, _options: None) -> int:
        return self._batch(count, lambda n: self.bpf_map_update_elem(fd, keys[n : n + 4], values[n : n + 4], 0))

    def bpf_map_delete_batch(self, fd: int, keys: bytes, count: Any, _options: None) -> int:
        return self._batch(count, lambda n: self.bpf_map_delete_elem(fd, keys[n : n + 4]))


def table(monkeypatch: pytest.MonkeyPatch, kernel: Kernel) -> libbpf.Map:
    monkeypatch.setattr(libbpf, "library", lambda: kernel)
    monkeypatch.setattr(libbpf, "get", lambda path: -1)
    return libbpf.Map(Path("/pins/slots"), 4, 4, 100)


def test_a_full_table_is_named_with_its_size(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(MapFull, match=r"slots is full at 100 entries: raise Agent\.spec\.maps\.slots"):
        table(monkeypatch, Kernel(errno.E2BIG)).update(b"\0" * 4, b"\0" * 4)


def test_other_failures_name_table_and_errno(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = table(monkeypatch, Kernel(errno.EPERM))
    with pytest.raises(DataplaneError, match=r"write slots: .*EPERM"):
        slots.update(b"\0" * 4, b"\0" * 4)
    with pytest.raises(DataplaneError, match=r"read slots: .*EPERM"):
        slots.lookup(b"\0" * 4)
    with pytest.raises(DataplaneError, match=r"delete from slots: .*EPERM"):
        slots.delete(b"\0" * 4)


def test_what_is_not_there_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    slots = table(monkeypatch, Kernel(errno.ENOENT))
    assert slots.lookup(b"\0" * 4) is None
    assert slots.delete(b"\0" * 4) is False


@pytest.mark.parametrize(("key", "value"), [(b"\0" * 3, b"\0" * 4), (b"\0" * 4, b"\0" * 5)])
def test_wrong_sizes_never_reach_the_kernel(monkeypatch: pytest.MonkeyPatch, key: bytes, value: bytes) -> None:
    with pytest.raises(ValueError, match="want 4\\+4"):
        table(monkeypatch, Kernel()).update(key, value)


def test_keys_are_walked_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    keys = tuple(n.to_bytes(4, "little") for n in range(5))
    slots = table(monkeypatch, Kernel(keys=keys))
    assert list(slots.keys()) == list(keys)
    assert list(table(monkeypatch, Kernel()).keys()) == []


def test_a_pin_that_is_not_there() -> None:
    with pytest.raises(DataplaneError, match="open pin /nowhere/x"):
        libbpf.get(Path("/nowhere/x"))


def test_a_machine_without_libbpf(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str, **_options: Any) -> Any:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(ct, "CDLL", absent)
    with pytest.raises(EnvironmentLack, match="libbpf is missing") as caught:
        libbpf.library.__wrapped__()
    assert "libbpf1" in caught.value.remedy


def numbered(count: int) -> list[tuple[bytes, bytes]]:
    return [(n.to_bytes(4, "little"), (n + 7).to_bytes(4, "big")) for n in range(count)]


@pytest.mark.parametrize("batches", [True, False])
def test_many_rows_come_and_go_with_or_without_batches(monkeypatch: pytest.MonkeyPatch, batches: bool) -> None:
    kernel = Hash(batches)
    slots, rows = table(monkeypatch, kernel), numbered(100)
    slots.update_many(rows)
    assert list(kernel.rows.items()) == rows
    assert kernel.calls == (1 if batches else 100)
    del kernel.rows[rows[50][0]]  # what is not there does no harm, and those after it go as well
    slots.delete_many([key for key, _value in rows])
    assert kernel.rows == {}


@pytest.mark.parametrize("batches", [True, False])
def test_a_batch_that_meets_a_full_table_names_it(monkeypatch: pytest.MonkeyPatch, batches: bool) -> None:
    kernel = Hash(batches, room=60)
    with pytest.raises(MapFull, match="slots is full"):
        table(monkeypatch, kernel).update_many(numbered(100))
    assert list(kernel.rows.items()) == numbered(60)
    slots = table(monkeypatch, kernel)
    with pytest.raises(ValueError, match="want 4\\+4"):
        slots.update_many([*numbered(2), (b"", b"")])
