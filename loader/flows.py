"""The `flows` table as a worker reads it, once per accepted connection: what the caller dialled, and who it is.

Every other table is read at leisure through `libbpf.Map`; this one is read on the data path, so the system call and its
buffers are prepared once and the layout is two struct formats, which a unit test holds against loader/abi.py.
"""

from __future__ import annotations

import ctypes as ct
import socket
import struct
from ipaddress import IPv6Address

from loader import libbpf

KEY = struct.Struct("<Q16s2s6x")
VALUE = struct.Struct("<Q16s2s2xII4x")
MAP_LOOKUP_ELEM = 1
MAPPED = b"\0" * 10 + b"\xff\xff"


class Flows:
    """`fd` is the map's descriptor and stays its owner's."""

    def __init__(self, fd: int) -> None:
        self._key = ct.create_string_buffer(KEY.size)
        self._value = ct.create_string_buffer(VALUE.size)
        # union bpf_attr: map_fd, key, value, flags
        self._attr = struct.pack("<IxxxxQQQ", fd, ct.addressof(self._key), ct.addressof(self._value), 0)
        self._call = libbpf.libc().syscall
        self._arguments = (
            ct.c_long(libbpf.SYS_BPF),
            ct.c_int(MAP_LOOKUP_ELEM),
            ct.c_char_p(self._attr),
            ct.c_uint(len(self._attr)),
        )
        self._texts: dict[bytes, str] = {}  # addresses of services: as many as the mesh ever had

    def __call__(self, netns: int, address: str, port: int) -> tuple[str, int, int] | None:
        """(address dialled, its port, cgroup id of the caller); None when no connect hook led this connection here."""
        packed = socket.inet_pton(socket.AF_INET6, address) if ":" in address else MAPPED + socket.inet_aton(address)
        KEY.pack_into(self._key, 0, netns, packed, port.to_bytes(2, "big"))
        if self._call(*self._arguments) != 0:
            return None
        cgroup, asked, asked_port, _service, _pid = VALUE.unpack_from(self._value)
        text = self._texts.get(asked)
        if text is None:
            parsed = IPv6Address(asked)
            text = self._texts[asked] = str(parsed.ipv4_mapped or parsed)
        return text, (asked_port[0] << 8) | asked_port[1], cgroup
