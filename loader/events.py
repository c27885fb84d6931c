"""The kernel's ring buffer as callbacks: callers in a namespace without a listener. Reading never blocks."""

from __future__ import annotations

import ctypes as ct
import os
from collections.abc import Callable
from pathlib import Path

from loader import abi, libbpf
from meshbpf.errors import DataplaneError

_CALLBACK = ct.CFUNCTYPE(ct.c_int, ct.c_void_p, ct.c_void_p, ct.c_size_t)


class Events:
    """Register `fileno()` with a loop, and call `read()` when it is readable."""

    def __init__(self, path: Path, receive: Callable[[abi.Event], None]) -> None:
        lib = libbpf.library()
        lib.ring_buffer__new.restype = ct.c_void_p
        self._map = libbpf.get(path)
        self._receive = receive
        self._callback = _CALLBACK(self._one)  # kept: C holds only its address
        self._ring = lib.ring_buffer__new(self._map, self._callback, None, None)
        if not self._ring:
            raise DataplaneError(f"cannot read the ring buffer {path}")

    def _one(self, context: int | None, data: int, size: int) -> int:
        if size >= ct.sizeof(abi.Event):
            self._receive(abi.Event.from_buffer_copy(ct.string_at(data, ct.sizeof(abi.Event))))
        return 0

    def fileno(self) -> int:
        return int(libbpf.library().ring_buffer__epoll_fd(ct.c_void_p(self._ring)))

    def read(self) -> None:
        libbpf.library().ring_buffer__consume(ct.c_void_p(self._ring))

    def close(self) -> None:
        libbpf.library().ring_buffer__free(ct.c_void_p(self._ring))
        os.close(self._map)
