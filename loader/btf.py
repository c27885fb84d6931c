"""Where the running kernel keeps the socket fields that the redirect programs read: offsets from its own BTF.

They become -D defines for bpf/lib/member.h. A kernel without BTF, or without one of these fields, has no redirect
(`redirect_defines` raises EnvironmentLack and says which), and loses nothing else. Read by libbpf, no policy here.
`leads_to_mptcp` is for the other programs, which do without where it is False.
"""

from __future__ import annotations

import ctypes as ct
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

from loader import libbpf
from meshbpf.errors import EnvironmentLack

STRUCT, UNION, ENUM = 4, 5, 6
MODIFIERS = {8, 9, 10, 11, 18}  # typedef, volatile, const, restrict, type tag: they stand before the type they mean
MAX_DEPTH = 8
# define → structure, field
FIELDS = {
    "AT_TCP_COPIED_SEQ": ("tcp_sock", "copied_seq"),
    "AT_TCP_WRITE_SEQ": ("tcp_sock", "write_seq"),
    "AT_ULP_OPS": ("inet_connection_sock", "icsk_ulp_ops"),
    "AT_SOCK_USER_DATA": ("sock", "sk_user_data"),
    "AT_SOCK_SOCKET": ("sock", "sk_socket"),
    "AT_SOCK_RCVLOWAT": ("sock", "sk_rcvlowat"),
    "AT_SOCK_FLAGS": ("sock_common", "skc_flags"),  # what a sock begins with
    "AT_SOCKET_FILE": ("socket", "file"),
    "AT_FILE_FLAGS": ("file", "f_flags"),
    "AT_PSOCK_INGRESS": ("sk_psock", "ingress_msg"),
    "AT_PSOCK_REFCNT": ("sk_psock", "refcnt"),
}
OPTIONAL = {"AT_IS_MPTCP": ("tcp_sock", "is_mptcp")}  # absent where the kernel has no MPTCP


class _Type(ct.Structure):
    _fields_ = [("name", ct.c_uint32), ("info", ct.c_uint32), ("size", ct.c_uint32)]

    @property
    def kind(self) -> int:
        return int(self.info) >> 24 & 0x1F

    @property
    def members(self) -> int:
        return int(self.info) & 0xFFFF


class _Member(ct.Structure):
    _fields_ = [("name", ct.c_uint32), ("type", ct.c_uint32), ("offset", ct.c_uint32)]


class _Value(ct.Structure):
    _fields_ = [("name", ct.c_uint32), ("value", ct.c_int32)]


@dataclass(frozen=True, slots=True)
class Field:
    """`offset` in bytes; `mask` selects a bit field within its byte, and is 0xff for everything else."""

    offset: int
    mask: int = 0xFF


class Btf:
    """The types of one kernel. `source` is a raw BTF file, the running kernel's by default."""

    def __init__(self, source: str = "/sys/kernel/btf/vmlinux") -> None:
        lib = libbpf.library()
        for name in ("btf__parse", "btf__type_by_id"):
            getattr(lib, name).restype = ct.c_void_p
        lib.btf__name_by_offset.restype = ct.c_char_p
        # libbpf 1.x answers NULL and sets errno, never an error pointer
        self._btf = lib.btf__parse(source.encode(), None)
        if not self._btf:
            raise EnvironmentLack(
                f"this kernel has no BTF at {source}", "boot a kernel built with CONFIG_DEBUG_INFO_BTF"
            )
        self._lib = lib

    def close(self) -> None:
        if self._btf:
            self._lib.btf__free(ct.c_void_p(self._btf))
            self._btf = None

    def field(self, struct: str, name: str) -> Field | None:
        """Where `name` lies in `struct`, in whatever nameless structure within; None when there is none."""
        found = self._lib.btf__find_by_name_kind(ct.c_void_p(self._btf), struct.encode(), STRUCT)
        return None if found < 0 else self._search(found, name, 0, MAX_DEPTH)

    def enumerator(self, enum: str, name: str) -> int | None:
        found = self._lib.btf__find_by_name_kind(ct.c_void_p(self._btf), enum.encode(), ENUM)
        if found < 0:
            return None
        return next((int(v.value) for v in self._parts(found, _Value) if self._name(v.name) == name), None)

    def _search(self, struct: int, name: str, base: int, depth: int) -> Field | None:
        bits_in_offset = bool(self._type(struct).info >> 31)
        for member in self._parts(struct, _Member):
            bits = base + (member.offset & 0xFFFFFF if bits_in_offset else member.offset)
            width = member.offset >> 24 if bits_in_offset else 0
            word = self._name(member.name)
            if word == name:
                return Field(bits // 8, ((1 << width) - 1) << bits % 8 & 0xFF if width else 0xFF)
            inner = self._resolve(member.type)
            if not word and depth and self._type(inner).kind in (STRUCT, UNION):
                found = self._search(inner, name, bits, depth - 1)
                if found is not None:
                    return found
        return None

    def _type(self, number: int) -> _Type:
        return _Type.from_address(self._address(number))

    def _address(self, number: int) -> int:
        return int(self._lib.btf__type_by_id(ct.c_void_p(self._btf), number))

    def _resolve(self, number: int) -> int:
        while self._type(number).kind in MODIFIERS:
            number = int(self._type(number).size)  # the same word holds the type meant
        return number

    def _name(self, offset: int) -> str:
        raw: bytes | None = self._lib.btf__name_by_offset(ct.c_void_p(self._btf), offset)
        return (raw or b"").decode()

    def _parts(self, number: int, part: Any) -> Iterator[Any]:
        start = self._address(number) + ct.sizeof(_Type)
        return iter((part * self._type(number).members).from_address(start))


@cache
def redirect_defines() -> dict[str, int]:
    """The defines of bpf/lib/member.h for this kernel. Raises EnvironmentLack, naming what is missing."""
    kernel = Btf()
    try:
        defines: dict[str, int] = {}
        for define, (struct, name) in FIELDS.items():
            found = kernel.field(struct, name)
            if found is None:
                raise EnvironmentLack(f"this kernel's BTF has no {struct}.{name}", "use a kernel from 5.10 to 6.18")
            defines[define] = found.offset
        for define, (struct, name) in OPTIONAL.items():
            found = kernel.field(struct, name)
            if found is not None:
                defines |= {define: found.offset, f"{define}_MASK": found.mask}
        zerocopy = kernel.enumerator("sock_flags", "SOCK_ZEROCOPY")
        if zerocopy is None:
            raise EnvironmentLack("this kernel's BTF has no SOCK_ZEROCOPY", "use a kernel from 5.10 to 6.18")
        # FIONREAD of a member learnt to count redirected bytes together with this field (6.6.128, 6.12.75, 6.18.14).
        counts = kernel.field("sk_psock", "msg_tot_len") is not None
        return defines | {"SOCK_ZEROCOPY": zerocopy, "ANSWERS": int(counts)}
    finally:
        kernel.close()


@cache
def leads_to_mptcp() -> bool:
    """Can a program get from a TCP socket to the MPTCP connection that it is a path of? From 5.19 on."""
    try:
        kernel = Btf()
    except EnvironmentLack:
        return False
    try:
        helper = kernel.enumerator("bpf_func_id", "BPF_FUNC_skc_to_mptcp_sock")
        return helper is not None and kernel.field("mptcp_sock", "first") is not None
    finally:
        kernel.close()
