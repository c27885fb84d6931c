"""A command under a seccomp filter that answers bpf(2) with EPERM, whole or one of its commands, as a container's
profile or a security module would: `python -m tests.support.seccomp CMD|all COMMAND…`.
"""

from __future__ import annotations

import ctypes as ct
import os
import struct
import sys

from loader import libbpf

LOAD, EQUAL, RETURN = 0x20, 0x15, 0x06  # of classic BPF
NUMBER, FIRST_ARGUMENT = 0, 16  # offsets in struct seccomp_data
ERRNO_EPERM, ALLOW = 0x00050001, 0x7FFF0000
SET_SECCOMP, FILTER, NO_NEW_PRIVS = 22, 2, 38


def _step(code: int, value: int, yes: int = 0, no: int = 0) -> bytes:
    return struct.pack("<HBBI", code, yes, no, value)


def refuse(command: int | None) -> None:
    """From here on, for this process and its children. `command`: of bpf(2), None: every one."""
    asked = b"" if command is None else _step(LOAD, FIRST_ARGUMENT) + _step(EQUAL, command, 0, 1)
    steps = (
        _step(LOAD, NUMBER) + _step(EQUAL, libbpf.SYS_BPF, 0, 1 + len(asked) // 8) + asked
        + _step(RETURN, ERRNO_EPERM) + _step(RETURN, ALLOW)
    )  # fmt: skip
    code = ct.create_string_buffer(steps)
    program = ct.create_string_buffer(struct.pack("@HP", len(steps) // 8, ct.addressof(code)))
    for call in ((NO_NEW_PRIVS, 1, 0, 0, 0), (SET_SECCOMP, FILTER, program, 0, 0)):
        if libbpf.libc().prctl(*call) != 0:
            raise OSError(ct.get_errno(), "prctl")


if __name__ == "__main__":
    refuse(None if sys.argv[1] == "all" else int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])
