"""A store that is damaged, read-only or full: named, left as it is, what it holds counts, and the registry goes on."""

from __future__ import annotations

import sqlite3
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from meshbpf.registry import database
from meshbpf.registry.content import Content, Count, PutRow
from meshbpf.registry.store import Store
from tests.unit.test_store import POOL, A, B, reopened


@pytest.mark.parametrize("content", [b"this is no database" * 1000, b"SQLite format 3\0" + b"\xff" * 5000])
async def test_a_corrupt_file_is_left_untouched_and_named(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "registry.db"
    path.write_bytes(content)
    store = Store(path)
    assert await store.open() == Content()
    assert str(path) in store.problem
    assert "memory only" in store.problem
    assert not await store.write([PutRow(A, "{}", 1.0)])
    given = await store.addresses([("orders", "default")], POOL)
    assert await store.addresses([("orders", "default")], POOL) == given
    await store.close()
    assert path.read_bytes() == content


async def test_damage_inside_a_valid_file_is_found(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    store = Store(path)
    await store.open()
    await store.write([PutRow(("orders", "default", str(number)), "x" * 500, 1.0) for number in range(200)])
    await store.close()
    data = bytearray(path.read_bytes())
    data[8192:40960] = b"\xa5" * (40960 - 8192)
    path.write_bytes(data)
    store = Store(path)
    assert await store.open() == Content()
    assert "memory only" in store.problem
    await store.close()


@pytest.mark.parametrize("place", ["/proc/meshbpf/registry.db", "/dev/null/registry.db"])
async def test_a_place_that_cannot_be_written_is_named(place: str) -> None:
    store = Store(place)
    assert await store.open() == Content()
    assert place in store.problem
    assert not await store.write([Count(1)])
    await store.close()


@pytest.mark.parametrize("with_file", [True, False])
async def test_a_read_only_directory_is_named(with_file: bool) -> None:
    program = """
import asyncio, os, sys
from meshbpf.registry.content import Count
from meshbpf.registry.store import Store
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write everywhere
async def main():
    store = Store(sys.argv[1])
    await store.open()
    print(store.problem, await store.write([Count(1)]))
    await store.close()
asyncio.run(main())
"""
    with tempfile.TemporaryDirectory() as directory:  # not tmp_path, whose parents are for one user only
        path = Path(directory) / "registry.db"
        if with_file:
            store = Store(path)
            await store.open()
            await store.close()
            path.chmod(0o444)
        Path(directory).chmod(0o555)
        said = subprocess.run([sys.executable, "-c", program, str(path)], capture_output=True, text=True, check=True)
        Path(directory).chmod(0o755)
    assert str(path) in said.stdout
    assert "memory only" in said.stdout
    assert said.stdout.endswith("False\n")


@pytest.mark.parametrize("journal", [False, True])
async def test_what_a_read_only_disk_holds_counts_although_nothing_is_added(journal: bool) -> None:
    """With a journal: the writer was killed, and what it wrote last is beside the file."""
    writer = """
import asyncio, os, signal, sys
from meshbpf.registry.store import Store
from meshbpf.registry.content import Count, Give, PutRow
async def main():
    store = Store(sys.argv[1])
    await store.open()
    await store.write([PutRow(("orders", "default", "a"), "{}", 5.0), Give(("orders", "default"), "127.96.0.9")])
    await store.write([Count(7)])
    if sys.argv[2] == "True":
        os.kill(os.getpid(), signal.SIGKILL)
    await store.close()
asyncio.run(main())
"""
    reader = """
import asyncio, os, sys
from meshbpf.registry.content import Count
from meshbpf.registry.store import Store
if os.geteuid() == 0:
    os.seteuid(65534)  # root may write everywhere
async def main():
    store = Store(sys.argv[1])
    print(await store.open())
    print(store.problem)
    print(await store.write([Count(8)]))
    await store.close()
asyncio.run(main())
"""
    with tempfile.TemporaryDirectory() as directory:  # not tmp_path, whose parents are for one user only
        path = Path(directory) / "registry.db"
        subprocess.run([sys.executable, "-c", writer, str(path), str(journal)], check=False)
        assert Path(f"{path}-wal").exists() is journal
        for file in Path(directory).iterdir():
            file.chmod(0o444)
        Path(directory).chmod(0o555)
        before = {file.name: file.read_bytes() for file in Path(directory).iterdir()}
        said = subprocess.run([sys.executable, "-c", reader, str(path)], capture_output=True, text=True, check=True)
        assert {file.name: file.read_bytes() for file in Path(directory).iterdir()} == before
        Path(directory).chmod(0o755)
    content, problem, written = said.stdout.splitlines()
    assert content == repr(
        Content({("orders", "default", "a"): ("{}", 5.0)}, {("orders", "default"): "127.96.0.9"}, generation=7)
    )
    assert "what it holds counts, registrations are kept in memory only" in problem
    assert written == "False"


async def test_a_disk_that_is_full_at_the_start_is_tried_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Store(tmp_path / "registry.db")
    await first.open()
    await first.write([PutRow(A, "{}", 1.0)])
    await first.close()

    def full(_connection: sqlite3.Connection) -> None:
        error = sqlite3.OperationalError("database or disk is full")
        error.sqlite_errorcode = sqlite3.SQLITE_FULL  # type: ignore[attr-defined]
        raise error

    monkeypatch.setattr(database, "prepare", full)
    store = Store(first.path)
    assert (await store.open()).instances == {A: ("{}", 1.0)}
    assert "full; the next change tries again" in store.problem
    assert await store.write([PutRow(B, "{}", 2.0)])
    assert store.problem == ""
    await store.close()
    monkeypatch.undo()
    assert (await reopened(store.path)).instances == {A: ("{}", 1.0), B: ("{}", 2.0)}
