"""Agent ↔ worker: JSON messages with file descriptors over a SOCK_SEQPACKET unix socket. Transport only.

What may be large (a mesh, statistics) travels in a memfd beside a small message, so that no message meets the socket
buffer's limit; whoever receives it reads it when and in the thread that suits. Descriptors received are owned by the
receiver.
"""

from __future__ import annotations

import asyncio
import json
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

MAX_FDS = 16
MAX_MESSAGE = 65536
Receive = Callable[[dict[str, Any], list[int]], None]


class Blob:
    """What came beside a message, unread."""

    def __init__(self, fd: int) -> None:
        self._file = open(fd, "rb")  # noqa: SIM115

    def read(self) -> Any:
        """Its value; once."""
        with self._file as file:
            file.seek(0)  # the sender's offset is at the end, and shared
            return json.load(file)


class Channel:
    """One end. `receive` is called in the loop with each message; `closed` once, when the other end is gone."""

    def __init__(self, sock: socket.socket, receive: Receive, closed: Callable[[], None]) -> None:
        sock.setblocking(False)
        self._sock = sock
        self._receive = receive
        self._closed = closed
        self._waiting: list[tuple[bytes, list[int]]] = []
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(sock.fileno(), self._readable)

    def send(self, message: dict[str, Any], fds: Sequence[int] = (), blob: Any = None) -> None:
        """Queue a message. `fds` are duplicated, the caller keeps its own; `blob` is any JSON value, or JSON as bytes,
        however large.

        Nothing is kept for an end that is gone: `closed` has said so.
        """
        if self._sock.fileno() < 0:
            return
        owned = [os.dup(fd) for fd in fds]
        if blob is not None:
            memory = os.memfd_create("meshbpf", os.MFD_CLOEXEC)
            with open(memory, "wb", closefd=False) as out:
                out.write(blob if isinstance(blob, bytes) else json.dumps(blob).encode())
            owned.append(memory)
            message = {**message, "blob": True}
        self._waiting.append((json.dumps(message).encode(), owned))
        self._flush()

    def _flush(self) -> None:
        while self._waiting:
            data, fds = self._waiting[0]
            try:
                socket.send_fds(self._sock, [data], fds)
            except BlockingIOError:
                self._loop.add_writer(self._sock.fileno(), self._flush)
                return
            except OSError:
                self.close()
                return
            self._waiting.pop(0)
            for fd in fds:
                os.close(fd)
        if self._sock.fileno() >= 0:
            self._loop.remove_writer(self._sock.fileno())

    def _readable(self) -> None:
        try:
            data, fds, _flags, _address = socket.recv_fds(self._sock, MAX_MESSAGE, MAX_FDS)
        except BlockingIOError:
            return
        except OSError:
            data, fds = b"", []
        if not data:
            self.close()
            return
        message: dict[str, Any] = json.loads(data)
        for fd in fds:
            os.set_inheritable(fd, False)
        if message.pop("blob", False):
            message["blob"] = Blob(fds.pop())
        self._receive(message, fds)

    def close(self) -> None:
        if self._sock.fileno() < 0:
            return
        self._loop.remove_reader(self._sock.fileno())
        self._loop.remove_writer(self._sock.fileno())
        self._sock.close()
        for _data, fds in self._waiting:
            for fd in fds:
                os.close(fd)
        self._waiting.clear()
        self._closed()
