"""Writes the access log of one worker without ever making the data loop wait.

Lines are collected and written at the latest after INTERVAL or CHUNK bytes, whole lines at a time. When the reader or
the disk does not take them, they wait in at most LIMIT bytes; what does not fit is lost, counted, and said so at most
once in WARN_EVERY. A file that was renamed or removed is opened anew. How a line looks is `meshbpf.accesslog_format`.
"""

from __future__ import annotations

import asyncio
import errno
import logging
import os
import select
import socket
import stat
from collections.abc import Callable

from meshbpf.accesslog_format import Seconds, json_line, text_line
from meshbpf.errors import ConfigError
from meshbpf.model import AccessLogSettings
from meshbpf.record import Record

INTERVAL = 0.1
CHUNK = 64 * 1024
LIMIT = 1024 * 1024
STAT_EVERY = 1.0
WARN_EVERY = 10.0

log = logging.getLogger("accesslog")


FLAGS = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOCTTY


def check(settings: AccessLogSettings) -> None:
    """Raises ConfigError when a worker could not write there, before any worker is started."""
    if settings.path in ("/dev/stdout", "/dev/stderr"):
        return
    try:
        os.close(os.open(settings.path, FLAGS, 0o640))
    except OSError as error:
        if error.errno != errno.ENXIO:  # a FIFO without reader yet
            raise ConfigError("Agent.spec.accessLog.path", f"cannot open {settings.path}: {error.strerror}") from error


class AccessLog:
    """`lost` is told ("accesslog", lines) whenever lines are dropped. ConfigError when the path cannot be opened."""

    def __init__(
        self, settings: AccessLogSettings, loop: asyncio.AbstractEventLoop, lost: Callable[[str, int], None]
    ) -> None:
        self._path = settings.path
        self._format = json_line if settings.format == "json" else text_line
        self._loop = loop
        self._lost = lost
        self._seconds = Seconds()
        self._lines: list[str] = []
        self._fresh = 0  # characters in _lines
        self._pending = bytearray()  # encoded, refused so far
        self._torn = False  # the last byte written was no newline: _pending goes on within a line
        self._timer: asyncio.TimerHandle | None = None
        self._checked = loop.time()
        self._warned = -WARN_EVERY
        self._unsaid = 0
        self._fd: int | None = None
        self._socket: socket.socket | None = None
        self._regular = False
        try:
            self._open()
        except OSError as error:
            if error.errno != errno.ENXIO:  # a FIFO without reader yet: the lines wait for one
                raise ConfigError("Agent.spec.accessLog.path", f"cannot open {self._path}: {error.strerror}") from error

    def write(self, record: Record) -> None:
        """Take one line; it reaches the file within INTERVAL."""
        if self._fresh + len(self._pending) >= LIMIT:  # before formatting: a full log must be the cheapest case
            self._drop(1)
            return
        line = self._format(record, self._seconds)
        self._lines.append(line)
        self._fresh += len(line)
        if self._fresh >= CHUNK:
            self.flush()
        elif self._timer is None:
            self._timer = self._loop.call_later(INTERVAL, self.flush)

    def flush(self) -> bool:
        """Write what is there, as far as that goes without waiting. True when nothing is left."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        now = self._loop.time()
        if now - self._checked >= STAT_EVERY:
            self._checked = now
            if self._fd is None or self._was_moved():
                self.reopen()
        self._push()
        if self._pending:
            self._timer = self._loop.call_later(INTERVAL, self.flush)
        return not self._pending

    def reopen(self) -> None:
        """Open the path again (after a rotation). What was logged before still goes to the old file, if it takes it."""
        old, old_socket, torn = self._fd, self._socket, self._torn
        if old is not None:
            self._push()
            torn = self._torn
        try:
            self._open()
        except OSError as error:
            if self._may_warn():
                log.warning("cannot reopen path=%s error=%r", self._path, error.strerror)
            return
        if old is not None:
            os.close(old)
        if old_socket is not None:
            old_socket.close()
        if torn:  # its beginning is in the old file: the rest would be garbage at the head of the new one
            del self._pending[: self._pending.find(b"\n") + 1]
            self._torn = False
            self._drop(1)

    def close(self) -> None:
        """Write what can be written now; the rest is lost and counted."""
        self.flush()
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if left := self._pending.count(b"\n"):
            self._pending.clear()
            self._drop(left)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
        if self._socket is not None:
            self._socket.close()

    def _push(self) -> None:
        if self._lines:
            self._pending += "".join(self._lines).encode("utf-8")
            self._lines.clear()
            self._fresh = 0
        if self._fd is None:
            return
        pending = self._pending
        try:
            while pending:
                size = len(pending)
                if not self._regular and size > select.PIPE_BUF:
                    # Workers share one pipe: only a write of at most PIPE_BUF is never mixed with another's.
                    size = pending.rfind(b"\n", 0, select.PIPE_BUF) + 1 or pending.find(b"\n") + 1
                with memoryview(pending) as whole, whole[:size] as part:
                    written = self._send(self._fd, part)
                if written:
                    self._torn = pending[written - 1] != 0x0A
                    del pending[:written]
                if written < size:
                    return
        except BlockingIOError:
            return
        except OSError as error:
            if self._may_warn():
                log.warning("cannot write path=%s error=%r", self._path, error.strerror)

    def _open(self) -> None:
        # Our own open file description (FLAGS), so that O_NONBLOCK is nobody else's business: stdout is shared.
        if self._path == "/dev/stdout" and stat.S_ISREG(os.fstat(1).st_mode):
            # `meshbpf run > FILE 2>&1`: with a position of our own we would write over the agent's log.
            self._fd, self._socket, self._regular = os.dup(1), None, True
            return
        try:
            self._fd, self._socket = os.open(self._path, FLAGS, 0o640), None
        except OSError as error:
            if error.errno != errno.ENXIO or self._path != "/dev/stdout" or not stat.S_ISSOCK(os.fstat(1).st_mode):
                raise
            # journald's stdout is a socket, which cannot be opened by name: share it, and never wait per call.
            self._fd, self._socket = os.dup(1), socket.socket(fileno=os.dup(1))
        self._regular = stat.S_ISREG(os.fstat(self._fd).st_mode)

    def _send(self, fd: int, part: memoryview) -> int:
        if self._socket is not None:
            return self._socket.send(part, socket.MSG_DONTWAIT)
        return os.write(fd, part)

    def _was_moved(self) -> bool:
        if self._fd is None or not self._regular:
            return False
        try:
            there = os.stat(self._path)
        except FileNotFoundError:
            return True
        except OSError as error:
            if self._may_warn():
                log.warning("cannot look at path=%s error=%r", self._path, error.strerror)
            return False
        here = os.fstat(self._fd)
        return (here.st_dev, here.st_ino) != (there.st_dev, there.st_ino)

    def _drop(self, count: int) -> None:
        self._lost("accesslog", count)
        self._unsaid += count
        if self._may_warn():
            log.warning("lines lost, the reader does not keep up lines=%d path=%s", self._unsaid, self._path)
            self._unsaid = 0

    def _may_warn(self) -> bool:
        now = self._loop.time()
        if now - self._warned < WARN_EVERY:
            return False
        self._warned = now
        return True
