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
