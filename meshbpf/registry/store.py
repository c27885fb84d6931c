"""What the registry must not forget, in one SQLite file: instances, addresses given from the pool, the generation.

Rules of this file:
- SQLite is touched by one thread of its own, never by the event loop: a slow disk delays answers, not heartbeats of
  others nor proxies. Whatever has queued up meanwhile is written in one transaction.
- `write` returns when the change is on the disk (WAL, synchronous=FULL): a 2xx answer survives SIGKILL and power loss.
- A store that cannot be used never stops the registry: it says so in `problem`, and `write` returns False. After a
  passing fault (a full disk) the next write stores everything again; what a read-only disk holds counts all the same;
  a corrupt or foreign file is left untouched, since the addresses in it may be worth saving, and everything stays in
  memory until the next start.
- One process per file (locking_mode=EXCLUSIVE): two agents on one file would give away each other's addresses.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import ipaddress
import logging
import queue
import sqlite3
import threading
from collections.abc import Collection, Sequence
from pathlib import Path

from meshbpf.registry import database
from meshbpf.registry.content import Change, Content, Give
from meshbpf.registry.instance import IPNetwork, ServiceId
from meshbpf.registry.pool import PoolFull, choose_address

LOCK_WAIT = 5.0  # seconds for a predecessor that is just leaving
BATCH = 1000
log = logging.getLogger("registry")

_Job = tuple[Sequence[Change], "concurrent.futures.Future[bool]"]


class Store:
    """`open` once, `write` any number of times, `close` once; all from one event loop."""

    def __init__(self, path: str | Path, lock_wait: float = LOCK_WAIT) -> None:
        self.path = Path(path)
        self.problem = ""  # why nothing is kept, with its remedy; empty when all is well
        self._lock_wait = lock_wait
        self._content = Content()
        self._database: sqlite3.Connection | None = None
        self._stale = False  # the file lacks something that the content has
        self._jobs: queue.SimpleQueue[_Job | None] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._addresses: dict[ServiceId, str] = {}  # the loop's own copy
        self._opened: concurrent.futures.Future[Content] = concurrent.futures.Future()

    async def open(self) -> Content:
        """Read everything. Never raises for a bad file: then the content is empty and `problem` says why."""
        self._thread = threading.Thread(target=self._run, name="registry-store", daemon=True)
        self._thread.start()
        content = await asyncio.shield(asyncio.wrap_future(self._opened))
        self._addresses = dict(content.addresses)
        return content

    async def close(self) -> None:
        """Write what is queued, then let go of the file."""
        if self._thread is not None:
            self._jobs.put(None)
            await asyncio.to_thread(self._thread.join)
            self._thread = None

    def send(self, changes: Sequence[Change]) -> asyncio.Future[bool]:
        """Queue `changes`, in the order of the calls. The future, if awaited, tells whether they are durable."""
        result: concurrent.futures.Future[bool] = concurrent.futures.Future()
        # Not cancellable: a caller who goes away must not take back what others have already seen.
        result.set_running_or_notify_cancel()
        if self._thread is None:
            result.set_result(False)
        else:
            self._jobs.put((changes, result))
        return asyncio.wrap_future(result)

    async def write(self, changes: Sequence[Change]) -> bool:
        """Make `changes` durable; False when they live in memory only (see `problem`)."""
        return await self.send(changes)

    async def addresses(
        self, services: Collection[ServiceId], pool: IPNetwork, avoid: Collection[str] = ()
    ) -> dict[ServiceId, str]:
        """An address of `pool` for each of `services`, the same for ever; new ones are durable before this returns.

        `avoid` are addresses that services name themselves. A mapping that the pool does not contain (somebody changed
        the pool) or that collides with `avoid` is given anew, otherwise it never changes. A service that is missing
        from the answer found the pool full.
        """
        given: dict[ServiceId, str] = {}
        changes: list[Change] = []
        taken = {*self._addresses.values(), *avoid}
        for service in sorted(services):
            address = self._addresses.get(service)
            if address is None or address in avoid or ipaddress.ip_address(address) not in pool:
                try:
                    address = choose_address(pool, service, taken)
                except PoolFull as full:
                    log.error("no address for service=%s: %s", ".".join(service), full)
                    continue
                taken.add(address)
                self._addresses[service] = address
                changes.append(Give(service, address))
            given[service] = address
        if changes:
            await self.write(changes)
        return given

    # ---- below: the thread ----

    def _run(self) -> None:
        self._open()
        self._opened.set_result(
            Content(dict(self._content.instances), dict(self._content.addresses), self._content.generation)
        )
        more = True
        while more:
            jobs, more = self._batch()
            durable = self._commit([change for changes, _ in jobs for change in changes])
            for _, result in jobs:
                result.set_result(durable)
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):  # everything is committed; a failed checkpoint loses nothing
                self._database.close()

    def _batch(self) -> tuple[list[_Job], bool]:
        """Everything that is queued, at least one job; False when it was the end."""
        jobs: list[_Job] = []
        job = self._jobs.get()
        while job is not None:
            jobs.append(job)
            if len(jobs) == BATCH:
                return jobs, True
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                return jobs, True
        return jobs, False

    def _open(self) -> None:
        try:
            self._database = database.connect(self.path, self._lock_wait)
            self._content = database.load(self._database)
        except database.FAULTS as error:
            self._give_up(error, database.rescued(self.path, error))
            return
        try:
            database.prepare(self._database)
        except sqlite3.Error as error:
            if database.passing(error):
                self._miss(error)
            else:
                self._give_up(error, None if database.locked(error) else self._content)

    def _give_up(self, error: BaseException, content: Content | None) -> None:
        """Stay in memory until the next start, with `content` if that much is known."""
        if self._database is not None:
            with contextlib.suppress(sqlite3.Error):  # it is the connection that is broken
                self._database.close()
            self._database = None
        self._content = content or Content()
        why = "another process holds it" if database.locked(error) else str(error) or type(error).__name__
        held = "what it holds counts, " if content else ""
        remedy = "make it writable, or move it away, and restart"
        if database.locked(error):
            remedy = "give each agent its own `store`"
        elif database.passing(error):
            remedy = "make room there, and restart"
        self.problem = f"registry store {self.path}: {why}; {held}registrations are kept in memory only ({remedy})"
        log.error("%s", self.problem)

    def _miss(self, error: sqlite3.Error) -> None:
        """The file lacks something from here on, until a write succeeds."""
        self._stale = True
        problem = f"registry store {self.path}: {error}; the next change tries again"
        if problem != self.problem:
            log.error("%s", problem)
        self.problem = problem

    def _commit(self, changes: Sequence[Change]) -> bool:
        for change in changes:
            self._content.apply(change)
        if self._database is None:
            return False
        if not changes and not self._stale:
            return True
        try:
            database.write(self._database, self._content.changes() if self._stale else changes)
        except sqlite3.OperationalError as error:  # a full disk, an I/O error: may pass
            self._miss(error)
            return False
        except sqlite3.Error as error:
            self._give_up(error, self._content)
            return False
        if self._stale:
            log.warning("registry store %s: written again, nothing is missing", self.path)
        self._stale, self.problem = False, ""
        return True
