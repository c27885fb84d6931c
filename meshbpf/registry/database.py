"""The store's SQLite file: its layout, reading all of it, writing changes. Knows no thread and remembers nothing.

Reading comes before the first write, so that what a full or read-only disk holds is known although nothing can be added
to it. SQLite cannot even read a file in WAL mode where it may not write; then a copy is read.
"""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import shutil
import sqlite3
import tempfile
from collections.abc import Iterable
from pathlib import Path

from meshbpf.registry.content import Change, Clear, Content, Count, Drop, Give, PutRow, Renew

LAYOUT = 1  # PRAGMA user_version; a file of a later layout is not touched
FAULTS = (sqlite3.Error, OSError, ValueError, TypeError)  # of a place or a file that cannot be used

_SCHEMA = """
CREATE TABLE IF NOT EXISTS instances (
    name TEXT NOT NULL, namespace TEXT NOT NULL, id TEXT NOT NULL, body TEXT NOT NULL, deadline REAL NOT NULL,
    UNIQUE (name, namespace, id));
CREATE TABLE IF NOT EXISTS addresses (
    name TEXT NOT NULL, namespace TEXT NOT NULL, address TEXT NOT NULL UNIQUE, PRIMARY KEY (name, namespace));
CREATE TABLE IF NOT EXISTS generation (one INTEGER PRIMARY KEY CHECK (one = 1), value INTEGER NOT NULL);
"""
_PUT = """INSERT INTO instances (name, namespace, id, body, deadline) VALUES (?, ?, ?, ?, ?)
    ON CONFLICT DO UPDATE SET body = excluded.body, deadline = excluded.deadline"""
_RENEW = "UPDATE instances SET deadline = ? WHERE name = ? AND namespace = ? AND id = ?"
_DROP = "DELETE FROM instances WHERE name = ? AND namespace = ? AND id = ?"
_GIVE = "INSERT INTO addresses VALUES (?, ?, ?) ON CONFLICT (name, namespace) DO UPDATE SET address = excluded.address"
_COUNT = "INSERT INTO generation VALUES (1, ?) ON CONFLICT DO UPDATE SET value = excluded.value"


def connect(path: Path, lock_wait: float) -> sqlite3.Connection:
    """`lock_wait`: seconds to wait for another process that holds the file. Raises one of FAULTS."""
    if not path.exists():
        path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.touch(mode=0o600)
    return sqlite3.connect(path, timeout=lock_wait, isolation_level=None)


def load(database: sqlite3.Connection) -> Content:
    """All that the file holds; nobody else may use it from here on. Raises one of FAULTS."""
    database.execute("PRAGMA locking_mode = EXCLUSIVE")
    (layout,) = database.execute("PRAGMA user_version").fetchone()
    if layout > LAYOUT:
        raise ValueError(f"it was written by a later version (layout {layout})")
    (verdict,) = database.execute("PRAGMA quick_check(1)").fetchone()
    if verdict != "ok":
        raise sqlite3.DatabaseError(f"damaged: {verdict}")
    content = Content()
    if layout == 0 and database.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
        return content  # new
    for name, namespace, id, body, deadline in database.execute(
        "SELECT name, namespace, id, body, deadline FROM instances ORDER BY rowid"
    ):
        content.instances[(str(name), str(namespace), str(id))] = (str(body), float(deadline))
    for name, namespace, address in database.execute("SELECT name, namespace, address FROM addresses"):
        content.addresses[(str(name), str(namespace))] = str(ipaddress.ip_address(address))
    for (value,) in database.execute("SELECT value FROM generation"):
        content.generation = int(value)
    return content


def prepare(database: sqlite3.Connection) -> None:
    """Take the lock for writing, and show now whether we may write. Raises sqlite3.Error."""
    database.execute("PRAGMA journal_mode = WAL")
    database.execute("PRAGMA synchronous = FULL")
    write(database, ())


def write(database: sqlite3.Connection, changes: Iterable[Change]) -> None:
    """All of `changes` or none of them. Raises sqlite3.Error."""
    with database:  # commits, or rolls back when anything below raises
        database.execute("BEGIN IMMEDIATE")
        if database.execute("PRAGMA user_version").fetchone() != (LAYOUT,):
            for statement in _SCHEMA.split(";"):
                database.execute(statement)
            database.execute(f"PRAGMA user_version = {LAYOUT}")
        for change in changes:
            _execute(database, change)


def rescued(path: Path, error: BaseException) -> Content | None:
    """What the file holds that cannot be opened because of `error`; None when that is not known, or not ours to use."""
    if locked(error):
        return None
    try:
        with tempfile.TemporaryDirectory(prefix="meshbpf-registry-") as folder:
            copy = Path(folder) / "registry.db"
            shutil.copyfile(path, copy)
            with contextlib.suppress(FileNotFoundError):
                shutil.copyfile(f"{path}-wal", f"{copy}-wal")
            with contextlib.closing(sqlite3.connect(copy, isolation_level=None)) as database:
                return load(database)
    except FAULTS:
        return None  # `error` says why


def locked(error: BaseException) -> bool:
    """Whether another process holds the file."""
    return isinstance(error, sqlite3.Error) and getattr(error, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_BUSY,
        sqlite3.SQLITE_LOCKED,
    )


def passing(error: BaseException) -> bool:
    """Whether time may heal it: a full disk, an I/O error."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO)
    return isinstance(error, sqlite3.OperationalError) and getattr(error, "sqlite_errorcode", 0) & 0xFF in (
        sqlite3.SQLITE_FULL,
        sqlite3.SQLITE_IOERR,
    )


def _execute(database: sqlite3.Connection, change: Change) -> None:
    match change:
        case PutRow(key, body, deadline):
            database.execute(_PUT, (*key, body, deadline))
        case Renew(key, deadline):
            database.execute(_RENEW, (deadline, *key))
        case Drop(key):
            database.execute(_DROP, key)
        case Give(service, address):
            database.execute(_GIVE, (*service, address))
        case Count(generation):
            database.execute(_COUNT, (generation,))
        case Clear():
            database.execute("DELETE FROM instances")
            database.execute("DELETE FROM addresses")
