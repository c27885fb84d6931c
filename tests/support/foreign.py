"""A neighbour's programs on a cgroup: raw bytecode, loaded and attached past our loader."""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
import socket
import struct
from collections.abc import Iterator
from pathlib import Path

from loader import libbpf

CGROUP_SOCK_ADDR, SOCK_OPS = 18, 13
INET4_CONNECT, INET4_GETPEERNAME, UDP4_SENDMSG, CGROUP_SOCK_OPS = 10, 29, 14, 3
EXCLUSIVE, OVERRIDE, MULTI, PREORDER = 0, 1, 2, 64


def op(code: int, to: int = 0, of: int = 0, jump: int = 0, value: int = 0) -> bytes:
    return struct.pack("<BBhi", code, of << 4 | to, jump, value)


PASS = op(0xB7, 0, value=1) + op(0x95)  # r0 = 1; exit
MARK = 77
# Asks for a callback per round-trip sample when a connection is established, and marks the socket at the first one.
WANTS_ROUND_TRIPS = (
    op(0xBF, 6, 1) + op(0x61, 2, 1)  # r6 = context; r2 = context->op
    + op(0x55, 2, jump=3, value=4) + op(0xB7, 2, value=8) + op(0x85, value=59) + op(0x05, jump=9)  # active established
    + op(0x55, 2, jump=8, value=12) + op(0x62, 10, jump=-4, value=MARK)  # a round-trip sample
    + op(0xBF, 1, 6) + op(0xB7, 2, value=1) + op(0xB7, 3, value=36) + op(0xBF, 4, 10) + op(0x07, 4, value=-4)
    + op(0xB7, 5, value=4) + op(0x85, value=49) + PASS  # setsockopt(SOL_SOCKET, SO_MARK)
)  # fmt: skip
# Asks for round-trip samples before the first packet, and by not asking what was asked before, for nothing else.
WANTS_ONLY_ROUND_TRIPS = (
    op(0x61, 2, 1) + op(0x55, 2, jump=2, value=3) + op(0xB7, 2, value=8) + op(0x85, value=59) + PASS
)  # fmt: skip


def _address(ip: str) -> int:
    """As a program finds it in `user_ip4`, and signed, as an instruction holds it."""
    return int(struct.unpack("=i", socket.inet_aton(ip))[0])


def translates(old: tuple[str, int], new: tuple[str, int]) -> bytes:
    """What a socket load balancer does at connect() or sendmsg(), and backwards at getpeername(): one address for
    another. Programs that keep no book, so that a test sees every step.
    """
    write = b"".join(
        op(0xB4, 3, value=value) + op(0x63, 1, 3, jump=field)
        for field, value in ((4, _address(new[0])), (24, socket.htons(new[1])))
    )
    skip = len(write) // 8
    return (
        op(0x61, 2, 1, jump=4) + op(0x56, 2, jump=skip + 2, value=_address(old[0]))
        + op(0x61, 2, 1, jump=24) + op(0x56, 2, jump=skip, value=socket.htons(old[1]))
        + write + PASS
    )  # fmt: skip


def denies(place: tuple[str, int]) -> bytes:
    """A policy of calls: EPERM for this destination."""
    return (
        op(0x61, 2, 1, jump=4) + op(0x56, 2, jump=4, value=_address(place[0]))
        + op(0x61, 2, 1, jump=24) + op(0x56, 2, jump=2, value=socket.htons(place[1]))
        + op(0xB7, 0, value=0) + op(0x95) + PASS
    )  # fmt: skip


def load(kind: int, attach_type: int, code: bytes = PASS) -> int:
    options = struct.pack("=Qii", 16, 0, attach_type)  # struct bpf_prog_load_opts, as much of it as we use
    fd = libbpf.library().bpf_prog_load(kind, b"neighbour", b"GPL", code, ct.c_size_t(len(code) // 8), options)
    assert fd >= 0, os.strerror(ct.get_errno())
    return int(fd)


@contextlib.contextmanager
def attached(cgroup: Path, flags: int | None, kind: int, attach_type: int, code: bytes = PASS) -> Iterator[int]:
    """The program's id, as long as it is attached: by link (`flags` None) or by BPF_PROG_ATTACH."""
    program = load(kind, attach_type, code)
    target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY)
    link = -1
    try:
        if flags is None:
            link = libbpf.link_create(program, target, attach_type)
        else:
            done = libbpf.library().bpf_prog_attach(program, target, attach_type, flags)
            if done != 0:
                raise OSError(-done, os.strerror(-done))
        yield number(program)
        if flags is not None:
            assert libbpf.library().bpf_prog_detach2(program, target, attach_type) == 0
    finally:
        for fd in (program, target, link):
            if fd >= 0:
                os.close(fd)


def number(program: int) -> int:
    lines = Path(f"/proc/self/fdinfo/{program}").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("prog_id:"))
