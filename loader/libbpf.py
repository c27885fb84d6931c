"""libbpf through ctypes: pins, maps, links, test runs. Errors become DataplaneError here, once; no policy in this file.

Objects are opened by pin, never by id: walking ids needs CAP_SYS_ADMIN, pins do not.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

from meshbpf.errors import DataplaneError, EnvironmentLack, MapFull

ANY, NOEXIST, EXIST = 0, 1, 2
SYS_BPF = {"x86_64": 321, "aarch64": 280}.get(os.uname().machine, 280)
PROG_TEST_RUN = 10
ENOTSUPP = 524  # the kernel's own, without a name in errno: a map type that knows no batches
PROGRAMS_OF_A_HOOK = 64  # of one cgroup; the kernel's own limit
BATCH = 1 << 14  # rows in one call: hundreds of times fewer calls, and still only a few hundred kilobytes


@cache
def library() -> Any:
    """libbpf.so.1. Raises EnvironmentLack when the distribution's package is missing."""
    try:
        lib = ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError as error:
        raise EnvironmentLack(f"libbpf is missing ({error})", "apt-get install libbpf1") from error
    lib.libbpf_set_print(None)
    return lib


@cache
def libc() -> Any:
    return ct.CDLL(None, use_errno=True)


def _check(result: int, what: str) -> int:
    if result >= 0:
        return result
    number = ct.get_errno() or -result
    raise DataplaneError(f"{what}: {os.strerror(number)} ({errno.errorcode.get(number, number)})")


def possible_cpus() -> int:
    return int(library().libbpf_num_possible_cpus())


def pin(fd: int, path: Path) -> None:
    _check(library().bpf_obj_pin(fd, os.fsencode(path)), f"pin {path}")


def get(path: Path) -> int:
    """A file descriptor of the pinned object. Raises DataplaneError when there is none."""
    fd = _check(library().bpf_obj_get(os.fsencode(path)), f"open pin {path}")
    os.set_inheritable(fd, False)
    return fd


def link_create(program: int, target: int, attach_type: int) -> int:
    return _check(library().bpf_link_create(program, target, attach_type, None), "attach by link")


def link_update(link: int, program: int) -> None:
    _check(library().bpf_link_update(link, program, None), "replace a link's program")


def prog_attach(program: int, target: int, attach_type: int) -> None:
    _check(library().bpf_prog_attach(program, target, attach_type, 0), "attach")


def prog_query(target: int, attach_type: int) -> tuple[int, list[int]]:
    """Of the programs on this very cgroup: how they were attached (0 alone, 1 yielding, 2 beside others), their ids."""
    flags, count, ids = ct.c_uint32(), ct.c_uint32(PROGRAMS_OF_A_HOOK), (ct.c_uint32 * PROGRAMS_OF_A_HOOK)()
    asked = library().bpf_prog_query(target, attach_type, 0, ct.byref(flags), ids, ct.byref(count))
    _check(asked, "ask for a hook's programs")
    return flags.value, list(ids[: count.value])


class Map:
    """One pinned table. Keys and values are bytes; a per-CPU value is the concatenation of every CPU's (8-aligned)."""

    def __init__(self, path: Path, key_size: int, value_size: int, size: int = 0, per_cpu: bool = False) -> None:
        self.name = path.name
        self.size = size
        self.key_size = key_size
        self.value_size = -(-value_size // 8) * 8 * possible_cpus() if per_cpu else value_size
        self.fd = get(path)
        self._value = ct.create_string_buffer(self.value_size)
        self._lib = library()
        self._batched = True  # until the kernel says otherwise

    def lookup(self, key: bytes) -> bytes | None:
        if self._lib.bpf_map_lookup_elem(self.fd, key, self._value) < 0:
            if ct.get_errno() == errno.ENOENT:
                return None
            _check(-1, f"read {self.name}")
        return self._value.raw

    def update(self, key: bytes, value: bytes, flags: int = ANY) -> None:
        """Raises MapFull when there is no room."""
        if len(key) != self.key_size or len(value) != self.value_size:
            raise ValueError(f"{self.name}: {len(key)}+{len(value)} bytes, want {self.key_size}+{self.value_size}")
        if self._lib.bpf_map_update_elem(self.fd, key, value, ct.c_uint64(flags)) < 0:
            if ct.get_errno() == errno.E2BIG:
                raise MapFull(self.name, self.size)
            _check(-1, f"write {self.name}")

    def delete(self, key: bytes) -> bool:
        """False when it was not there."""
        if self._lib.bpf_map_delete_elem(self.fd, key) < 0:
            if ct.get_errno() == errno.ENOENT:
                return False
            _check(-1, f"delete from {self.name}")
        return True

    def update_many(self, rows: Sequence[tuple[bytes, bytes]]) -> None:
        """As `update` of each row, in order, in as few calls as the kernel allows. Raises MapFull; rows before the one
        that did not fit are there then.
        """
        at = 0
        while self._batched and len(rows) - at > 1:
            some = rows[at : at + BATCH]
            keys, values = b"".join([key for key, _ in some]), b"".join([value for _, value in some])
            if len(keys) != len(some) * self.key_size or len(values) != len(some) * self.value_size:
                break  # the row's own update names its sizes
            count = ct.c_uint32(len(some))
            if self._lib.bpf_map_update_batch(self.fd, keys, values, ct.byref(count), None) >= 0:
                at += len(some)
                continue
            at += self._refused(count.value, len(some))
            break  # the next row's own update says what is wrong, or the kernel knows no batches
        for key, value in rows[at:]:
            self.update(key, value)

    def delete_many(self, keys: Sequence[bytes]) -> None:
        """As `delete` of each key, in order; those that are not there do no harm."""
        at = 0
        while self._batched and len(keys) - at > 1:
            some = keys[at : at + BATCH]
            count = ct.c_uint32(len(some))
            if self._lib.bpf_map_delete_batch(self.fd, b"".join(some), ct.byref(count), None) >= 0:
                at += len(some)
                continue
            at += self._refused(count.value, len(some))
            self.delete(keys[at])  # the one that was not there, or whose error names what is wrong
            at += 1
        for key in keys[at:]:
            self.delete(key)

    def _refused(self, count: int, asked: int) -> int:
        """How many rows a batch did before the kernel refused one; 0, and no more batches, when it knows none of them:
        kernels before 5.6 leave the count as it was.
        """
        if ct.get_errno() in (errno.EINVAL, errno.EOPNOTSUPP, ENOTSUPP):
            self._batched = False
            return 0
        return count if count < asked else 0

    def keys(self) -> Iterator[bytes]:
        key, following = None, ct.create_string_buffer(self.key_size)
        while self._lib.bpf_map_get_next_key(self.fd, key, following) >= 0:
            yield following.raw
            key = following.raw

    def items(self) -> Iterator[tuple[bytes, bytes]]:
        """A snapshot's worth of entries; one that vanishes in between is left out."""
        found = self._read_many() if self._batched else None
        if found is not None:
            yield from found
            return
        for key in list(self.keys()):
            value = self.lookup(key)
            if value is not None:
                yield key, value

    def _read_many(self) -> list[tuple[bytes, bytes]] | None:
        """All rows of a hash, bucket after bucket; None when the kernel knows no batches of this kind of table."""
        found: list[tuple[bytes, bytes]] = []
        size, key_size, value_size = BATCH, self.key_size, self.value_size
        keys, values = ct.create_string_buffer(size * key_size), ct.create_string_buffer(size * value_size)
        place, following = None, ct.create_string_buffer(max(key_size, 4))
        while True:
            count = ct.c_uint32(size)
            done = self._lib.bpf_map_lookup_batch(self.fd, place, following, keys, values, ct.byref(count), None)
            number = 0 if done >= 0 else ct.get_errno()
            if number not in (0, errno.ENOENT):  # ENOENT: these were the last
                return None
            raw_keys, raw_values = keys.raw, values.raw
            found += [
                (raw_keys[n * key_size : (n + 1) * key_size], raw_values[n * value_size : (n + 1) * value_size])
                for n in range(count.value)
            ]
            if number:
                return found
            place = following.raw

    def info(self) -> dict[str, str]:
        """What the kernel says of it: map_type, key_size, value_size, max_entries, memlock (bytes), …"""
        lines = Path(f"/proc/self/fdinfo/{self.fd}").read_text().splitlines()
        return dict(line.split(":\t", 1) for line in lines if ":\t" in line)

    def shape(self) -> tuple[str, ...]:
        """Kind, key size and value size, as the kernel has them."""
        said = self.info()
        return said["map_type"], said["key_size"], said["value_size"]

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> Map:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


class TestRunner:
    """Runs one SCHED_CLS program on a packet of our making, in the calling thread's network namespace.

    `run` returns (the program's return value, the packet as it left it). Costs about 4 µs.
    """

    __test__ = False  # not a pytest class

    def __init__(self, program: int, packet_size: int) -> None:
        self._input = ct.create_string_buffer(packet_size)
        self._output = ct.create_string_buffer(packet_size)
        self._attr = (ct.c_uint64 * 10)()
        self._size = packet_size
        words = ct.cast(self._attr, ct.POINTER(ct.c_uint32))
        words[0] = program
        words[2] = words[3] = packet_size
        self._words = words
        self._attr[2] = ct.addressof(self._input)
        self._attr[3] = ct.addressof(self._output)
        self._syscall = libc().syscall

    def run(self, packet: bytes) -> tuple[int, bytes]:
        self._input.raw = packet
        self._words[1] = 0
        self._words[2] = self._words[3] = self._size
        self._words[8] = 1
        if self._syscall(SYS_BPF, PROG_TEST_RUN, ct.byref(self._attr), ct.c_uint32(80)) < 0:
            _check(-1, "run the command program")
        return int(self._words[1]), self._output.raw
