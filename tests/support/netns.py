"""Network namespaces without names: they end with the last socket, descriptor or process in them."""

from __future__ import annotations

import contextlib
import ctypes as ct
import os
import subprocess
from collections.abc import Iterator

CLONE_NEWNET = 0x40000000
_libc = ct.CDLL(None, use_errno=True)


def _call(function: str, *arguments: int) -> None:
    if getattr(_libc, function)(*arguments) != 0:
        number = ct.get_errno()
        raise OSError(number, f"{function}: {os.strerror(number)}")


@contextlib.contextmanager
def fresh() -> Iterator[int]:
    """Within: the calling thread, and what it starts, live in a new namespace whose loopback is up."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("unshare", CLONE_NEWNET)
        there = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        try:
            subprocess.run(["ip", "link", "set", "lo", "up"], check=True)
            yield there
        finally:
            os.close(there)
            _call("setns", home, CLONE_NEWNET)
    finally:
        os.close(home)


@contextlib.contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Within: the calling thread lives in the namespace that the descriptor names."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", namespace, CLONE_NEWNET)
        try:
            yield
        finally:
            _call("setns", home, CLONE_NEWNET)
    finally:
        os.close(home)
