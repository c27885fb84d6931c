"""What happens in directories, as the kernel tells it (inotify(7)), and which files are being written by that.

Rule: a file that somebody has begun to write is whole when he closes it, or when another takes its name. Who never
closes is given up on by whoever asks: here nothing waits longer than it is told to.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import struct
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

MODIFY, ATTRIB, CLOSE_WRITE, MOVED_FROM, MOVED_TO = 0x2, 0x4, 0x8, 0x40, 0x80
CREATE, DELETE, DELETE_SELF, MOVE_SELF, OVERFLOW = 0x100, 0x200, 0x400, 0x800, 0x4000
ONLYDIR, ISDIR = 0x1000000, 0x40000000
_MASK = (
    MODIFY | ATTRIB | CLOSE_WRITE | MOVED_FROM | MOVED_TO | CREATE | DELETE | DELETE_SELF | MOVE_SELF | ONLYDIR
)  # fmt: skip
SPACING = 0.05  # a log may be written beside the configuration, and each look at names and times costs a little
BREATH = 0.005  # … and so does each look at who it was
_HEAD = struct.Struct("iIII")  # watch, mask, cookie, length of the name
_LIBC = ctypes.CDLL(None, use_errno=True)


class Event(NamedTuple):
    """`watch` numbers the directory."""

    watch: int
    mask: int
    name: str


Open = frozenset[tuple[int, str]]


def still_open(before: Open, events: Iterable[Event]) -> Open:
    """The files that are being written, after these events. Pure.

    One that was made counts as well: what is made by writing is closed at once, and what is not (a link) is waited for
    in vain.
    """
    found = set(before)
    for event in events:
        if event.mask & OVERFLOW:
            found.clear()
        elif event.mask & (MODIFY | CREATE) and not event.mask & ISDIR:
            found.add((event.watch, event.name))
        elif event.mask & (CLOSE_WRITE | MOVED_FROM | MOVED_TO | DELETE):
            found.discard((event.watch, event.name))
    return frozenset(found)


def parse(data: bytes) -> Iterator[Event]:
    at = 0
    while at < len(data):
        watch, mask, _cookie, length = _HEAD.unpack_from(data, at)
        at += _HEAD.size
        yield Event(watch, mask, os.fsdecode(data[at : at + length].rstrip(b"\0")))
        at += length


class Inotify:
    """Watches `folders` from now on. Events of files whose name is not `meant` only say that something has happened.

    Made inside the running loop; close it. Raises OSError where the kernel has no watch left, or a folder is gone.
    """

    def __init__(self, folders: Sequence[Path], meant: Callable[[str], bool]) -> None:
        self._heard = 0  # events of files that are meant
        self._answered = 0  # … when `changed` returned
        self._meant = meant
        self._open: Open = frozenset()
        self._fd = _checked(_LIBC.inotify_init1(os.O_NONBLOCK | os.O_CLOEXEC), "inotify")
        self._readable = asyncio.Event()
        try:
            for folder in folders:
                _checked(_LIBC.inotify_add_watch(self._fd, os.fsencode(folder), _MASK), str(folder))
        except OSError:
            os.close(self._fd)
            raise
        asyncio.get_running_loop().add_reader(self._fd, self._readable.set)

    def close(self) -> None:
        asyncio.get_running_loop().remove_reader(self._fd)
        os.close(self._fd)

    @property
    def writing(self) -> bool:
        """Whether a file that is meant is being written, and nobody has given up on it."""
        return bool(self._open)

    async def changed(self, patience: float, quiet: float, longest: float) -> bool:
        """Whether something happens within `patience` seconds; returns when no file that is meant is being written, or
        none was for `quiet` seconds, or after `longest`. What only others do is told at most every SPACING seconds; it
        must not delay the rename that a draft is written for.
        """
        if not await self._more(patience):
            return False
        spaced = asyncio.get_running_loop().time() + SPACING
        while self._heard == self._answered and asyncio.get_running_loop().time() < spaced:
            await asyncio.sleep(BREATH)
            self._take()
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(longest):
                while self._open and await self._more(quiet):
                    pass
        self._open = frozenset()  # who is not done by now is given up on
        self._answered = self._heard
        return True

    def take(self) -> int:
        """How many events there have been by now of files that are meant; `changed` returns for each."""
        if self._take():
            self._readable.set()
        return self._heard

    async def _more(self, patience: float) -> bool:
        """Take what has happened, waiting for it; False when nothing has."""
        try:
            async with asyncio.timeout(patience):
                await self._readable.wait()
        except TimeoutError:
            return False
        self._readable.clear()
        self._take()
        return True

    def _take(self) -> bool:
        some = False
        with contextlib.suppress(BlockingIOError):
            while True:
                events = list(parse(os.read(self._fd, 65536)))
                some = True
                meant = [event for event in events if event.mask & OVERFLOW or self._meant(event.name)]
                self._heard += len(meant)
                self._open = still_open(self._open, meant)
        return some


def _checked(result: int, what: str) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()), what)
    return result
