"""The files of `-c` as a source: every saved change is a new snapshot, a bad file keeps the last good one.

Rules:
- directories are watched, not files: editors and ConfigMaps replace files by renaming, which a watch on a file misses.
  Every directory that a symbolic link on the way passes through is watched as well (`a.yaml → ..data/a.yaml`);
- what was read decides, not what was notified: each wake-up reads everything and compares, so that a notification too
  many costs a few milliseconds, and one too few (network file systems, a directory made later) is made up for within
  a second;
- a file that is being written is waited for; what was read while something began to be written is read again, and so
  is what was another after reading than before it: a ConfigMap is swapped as a whole, and is to be read as a whole;
- reading and parsing happen on a thread.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import AsyncGenerator, Sequence
from dataclasses import replace
from pathlib import Path

from meshbpf.errors import ConfigError
from meshbpf.registry.base import Snapshot
from meshbpf.registry.inotify import Inotify
from meshbpf.schema import Known, files, parse
from meshbpf.tasks import spawn

log = logging.getLogger("registry.file")

QUIET_SECONDS = 0.4  # a file that is written and not closed is read when nothing more has happened for so long
LONGEST_SECONDS = 5.0  # or when things have been happening for so long
LOOK_SECONDS = 1.0  # looks at names, sizes and times without any notification
MOST_LINKS = 16
MOST_READS = 8

Content = list[tuple[str, str]] | str  # what was read, or why it could not be
Stamp = tuple[tuple[str, int, int, int], ...]


class FileSource:
    """`reload` (SIGHUP) reads again and tells even if nothing changed; `watch` may be iterated once at a time."""

    name = "files"

    def __init__(self, paths: Sequence[Path]) -> None:
        self._paths = [Path(path) for path in paths]
        self._pieces: Known = {}
        self._first: tuple[list[tuple[str, str]], Snapshot] | None = None
        self._wake = asyncio.Event()
        self._told_to = False
        self._stamp: Stamp = ()  # of what was read, taken before it was read
        self._notices: Inotify | None = None  # while there are some
        self._listening = asyncio.Event()  # … or cannot be

    def first(self, texts: list[tuple[str, str]]) -> Snapshot:
        """What the files mean that have just been read: the first word of `watch`, and what stays should they be bad by
        then. Raises `ConfigErrors` with every fault.
        """
        snapshot = _snapshot(texts, self._pieces)
        self._first = (texts, snapshot)
        return snapshot

    def reload(self) -> None:
        self._told_to = True
        self._wake.set()

    async def watch(self) -> AsyncGenerator[Snapshot, None]:
        self._stamp = await asyncio.to_thread(_stamp, self._paths)
        watcher = spawn(self._notice(), "watch configuration files")
        good, filled = Snapshot(source=self.name), frozenset[str]()
        last: Content | None = None
        try:
            if self._first is not None:
                (last, good), self._first = self._first, None
                filled = frozenset(file for file, text in last if text)
                yield good
                await self._listening.wait()  # whoever writes just now is heard when he closes
            while True:
                self._wake.clear()
                told, self._told_to = self._told_to, False
                notices = self._notices
                heard = 0 if notices is None else notices.take()
                content = await asyncio.to_thread(_content, self._paths)
                if notices is not None and notices is self._notices and (notices.take() != heard or notices.writing):
                    self._told_to |= told
                    await self._wake.wait()  # half of it may have been written by then: what we hear of wakes us
                    continue
                if told or content != last:
                    last = content
                    now = await asyncio.to_thread(_next, content, good, filled, self._pieces)
                    if not now.error and not isinstance(content, str):
                        good, filled = now, frozenset(file for file, text in content if text)
                    yield now
                await self._wake.wait()
        finally:
            watcher.cancel()
            await asyncio.wait([watcher])

    async def _notice(self) -> None:
        """Set `_wake` whenever something may have changed, for ever."""
        complained = ""
        while True:
            folders = await asyncio.to_thread(watched, self._paths)
            try:
                await self._until_other(folders)
                complained = ""
            except OSError as error:
                if str(error) != complained:
                    complained = str(error)
                    log.warning("no change notifications, looking every second instead error=%s", error)
                self._listening.set()
                await asyncio.sleep(LOOK_SECONDS)
                self._wake.set()

    async def _until_other(self, folders: Sequence[Path]) -> None:
        """Wake at each change in `folders`; return when others must be watched."""
        if not folders:
            raise OSError("none of the paths exists")
        names = {path.name for path in self._paths} | {Path(os.path.realpath(path)).name for path in self._paths}
        with contextlib.closing(
            Inotify(folders, lambda name: name in names or files.is_configuration(name))
        ) as notices:
            self._notices = notices
            self._listening.set()
            patience, seen = 0.0, self._stamp  # what happened before we listened is seen by a look
            try:
                while True:
                    change = await notices.changed(patience, QUIET_SECONDS, LONGEST_SECONDS)
                    stamp = await asyncio.to_thread(_stamp, self._paths)
                    unheard = stamp != self._stamp and not change
                    if change or (unheard and stamp == seen):
                        self._stamp = stamp
                        self._wake.set()
                    patience, seen = QUIET_SECONDS if unheard else LOOK_SECONDS, stamp
                    if await asyncio.to_thread(watched, self._paths) != folders:
                        return
            finally:
                self._notices = None


def watched(paths: Sequence[Path]) -> list[Path]:
    """The directories whose entries decide what `paths` are; those that do not exist are represented by a parent."""
    found: set[Path] = set()
    for path in paths:
        try:
            for file in [path, *files.files(path)]:
                found.update(_folders(file))
            if path.is_dir():
                found.add(path)
        except ConfigError:
            found.update(_folders(path))  # unreadable: said when it is read; here its surroundings are enough
    return sorted(folder for folder in found if folder.is_dir())


def _folders(path: Path) -> list[Path]:
    """Where `path` stands, and where each symbolic link leads that it passes through."""
    found: list[Path] = []
    todo = [Path(os.path.abspath(path))]
    while todo and len(found) < MOST_LINKS:
        here = todo.pop()
        found.append(_existing(here.parent))
        for part in (here, here.parent):  # `a.yaml → ..data/a.yaml` where `..data → ..2024`
            if part.is_symlink():
                todo.append(part.parent / os.readlink(part) / ("" if part == here else here.name))
    return found


def _existing(folder: Path) -> Path:
    while not folder.is_dir() and folder != folder.parent:
        folder = folder.parent
    return folder


def _stamp(paths: Sequence[Path]) -> Stamp:
    """Names, inodes, sizes and times: differs when a file may have changed, without reading it."""
    found = []
    for path in paths:
        try:
            for file in files.files(path):
                stat = file.stat()
                found.append((str(file), stat.st_ino, stat.st_size, stat.st_mtime_ns))
        except (OSError, ConfigError) as error:
            found.append((f"{path}: {error}", 0, 0, 0))
    return tuple(found)


def _content(paths: Sequence[Path]) -> Content:
    found: Content = ""
    for _ in range(MOST_READS):
        before = _stamp(paths)
        try:
            found = files.texts(paths)
        except ConfigError as error:
            found = str(error)
        if _stamp(paths) == before:
            break
    return found  # somebody who never stops is read as he was found last: what follows wakes us


def _next(content: Content, good: Snapshot, filled: frozenset[str], known: Known) -> Snapshot:
    """The snapshot of what was read, or the last good one with the reason why it is not newer.

    `filled` are the files that said something: a writer who truncates first and writes later (`generate > mesh.yaml`)
    must not take every service away for that moment.
    """
    if isinstance(content, str):
        return replace(good, error=content, stale=True)
    emptied = [file for file, text in content if not text and file in filled]
    if emptied:
        why = "is empty, so what it said before stays: write a comment into it if nothing is meant"
        return replace(good, error="\n".join(f"{file}:1:1: {why}" for file in emptied), stale=True)
    try:
        return _snapshot(content, known)
    except ConfigError as error:
        return replace(good, error=str(error), stale=True)


def _snapshot(texts: Sequence[tuple[str, str]], known: Known) -> Snapshot:
    parsed = parse(texts, known)
    return Snapshot(parsed.services, parsed.policies, parsed.agent, source=FileSource.name)
