"""The store: what was answered is on the disk; a store in trouble says so and never stops the registry."""

from __future__ import annotations

import ipaddress
import sqlite3
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from meshbpf.registry import database
from meshbpf.registry.content import Change, Content, Count, Drop, Give, PutRow, Renew
from meshbpf.registry.pool import PoolFull, choose_address
from meshbpf.registry.store import Store

A, B = ("orders", "default", "a"), ("orders", "default", "b")
POOL = ipaddress.ip_network("127.96.0.0/16")


async def reopened(path: Path) -> Content:
    store = Store(path)
    content = await store.open()
    assert store.problem == ""
    await store.close()
    return content


async def test_every_kind_of_change_comes_back_in_order(tmp_path: Path) -> None:
    store = Store(tmp_path / "deep" / "registry.db")
    assert await store.open() == Content()
    changes: list[Change] = [PutRow(B, "{}", 1.0), PutRow(A, "{}", 2.0), Give(("orders", "default"), "127.96.0.9")]
    assert await store.write(changes)
    assert await store.write([Renew(A, 7.0), PutRow(B, '{"x": 1}', 3.0), Count(12)])
    await store.close()
    content = await reopened(store.path)
    assert list(content.instances.items()) == [(B, ('{"x": 1}', 3.0)), (A, ("{}", 7.0))]
    assert content.addresses == {("orders", "default"): "127.96.0.9"}
    assert content.generation == 12
    assert store.path.stat().st_mode & 0o777 == 0o600


async def test_drop_is_durable_and_renewing_the_dropped_does_nothing(tmp_path: Path) -> None:
    store = Store(tmp_path / "registry.db")
    await store.open()
    await store.write([PutRow(A, "{}", 1.0)])
    await store.write([Drop(A), Renew(A, 5.0)])
    await store.close()
    assert (await reopened(store.path)).instances == {}


async def test_writes_queued_before_close_are_kept(tmp_path: Path) -> None:
    store = Store(tmp_path / "registry.db")
    await store.open()
    pending = [store.send([Count(number)]) for number in range(3000)]
    await store.close()
    assert all([await future for future in pending])
    assert (await reopened(store.path)).generation == 2999
    assert not await store.write([Count(1)]), "closed: says that nothing was kept"


async def test_a_written_change_survives_sigkill(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    program = f"""
import asyncio, os, signal
from meshbpf.registry.store import Store
from meshbpf.registry.content import PutRow
async def main():
    store = Store({str(path)!r})
    await store.open()
    assert await store.write([PutRow(("orders", "default", "a"), "{{}}", 5.0)])
    os.kill(os.getpid(), signal.SIGKILL)
asyncio.run(main())
"""
    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == -9
    assert (await reopened(path)).instances == {A: ("{}", 5.0)}


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


async def test_a_file_of_a_later_version_is_not_touched(tmp_path: Path) -> None:
    path = tmp_path / "registry.db"
    with sqlite3.connect(path) as database:
        database.execute("PRAGMA user_version = 99")
        database.execute("CREATE TABLE instances (other TEXT)")
    database.close()
    before = path.read_bytes()
    store = Store(path)
    await store.open()
    assert "later version" in store.problem
    await store.close()
    assert path.read_bytes() == before


async def test_two_processes_do_not_share_a_file(tmp_path: Path) -> None:
    first, second = Store(tmp_path / "registry.db"), Store(tmp_path / "registry.db", lock_wait=0.05)
    await first.open()
    await second.open()
    assert "another process holds it" in second.problem
    assert await first.write([Count(1)])
    await second.close()
    await first.close()


class Pragma(list[Change]):
    """Empty changes that run a pragma where they are read: on the thread that alone may use the connection."""

    def __init__(self, store: Store, text: str) -> None:
        super().__init__()
        self.store, self.text = store, text

    def __iter__(self) -> Iterator[Change]:
        assert self.store._database is not None
        self.store._database.execute(f"PRAGMA {self.text}").fetchall()
        return iter(())


async def test_a_passing_fault_is_made_good_by_the_next_write(tmp_path: Path) -> None:
    store = Store(tmp_path / "registry.db")
    await store.open()
    await store.write([PutRow(A, "{}", 1.0)])
    await store.write(Pragma(store, "max_page_count = 1"))  # becomes the present size: SQLite's way to be out of space
    big = '"' + "x" * 20_000 + '"'
    assert not await store.write([PutRow(B, big, 2.0)])
    assert "full" in store.problem
    # The pragma takes effect while the jobs are read, before the batch is written.
    assert await store.write(Pragma(store, "max_page_count = 1000000"))
    assert store.problem == ""
    assert await store.write([Count(5)])
    await store.close()
    content = await reopened(store.path)
    assert content.instances == {A: ("{}", 1.0), B: (big, 2.0)}
    assert content.generation == 5


async def test_an_address_never_changes_and_is_never_given_twice(tmp_path: Path) -> None:
    pool = ipaddress.ip_network("127.96.0.0/28")
    store = Store(tmp_path / "registry.db")
    await store.open()
    services = [(f"s{number}", "default") for number in range(14)]
    given = {**await store.addresses(services[:3], pool), **await store.addresses(services, pool)}
    assert len(set(given.values())) == 14
    assert all(ipaddress.ip_address(address) in pool for address in given.values())
    assert await store.addresses([*services, ("one-too-many", "default")], pool) == given
    await store.close()
    store = Store(store.path)
    await store.open()
    assert await store.addresses(list(reversed(services)), pool) == given
    await store.close()


async def test_an_address_is_given_anew_when_the_pool_moved_or_a_service_claims_it(tmp_path: Path) -> None:
    store = Store(tmp_path / "registry.db")
    await store.open()
    orders = ("orders", "default")
    first = (await store.addresses([orders], POOL))[orders]
    claimed = (await store.addresses([orders], POOL, avoid=[first]))[orders]
    assert claimed != first
    moved = (await store.addresses([orders], ipaddress.ip_network("127.97.0.0/16")))[orders]
    assert moved.startswith("127.97.")
    await store.close()
    assert (await reopened(store.path)).addresses == {orders: moved}


def test_the_choice_depends_on_the_name_alone_and_avoids_the_ends() -> None:
    assert choose_address(POOL, ("orders", "default"), ()) == choose_address(POOL, ("orders", "default"), ["1.2.3.4"])
    assert choose_address(POOL, ("orders", "default"), ()) != choose_address(POOL, ("orders", "shop"), ())
    tiny = ipaddress.ip_network("127.96.0.0/30")
    for number in range(50):
        assert choose_address(tiny, (f"s{number}", "x"), ()) in {"127.96.0.1", "127.96.0.2"}
    with pytest.raises(PoolFull):
        choose_address(tiny, ("orders", "default"), ["127.96.0.1", "127.96.0.2"])
    assert choose_address(ipaddress.ip_network("127.96.0.7/32"), ("a", "b"), ()) == "127.96.0.7"
    assert ipaddress.ip_address(choose_address(ipaddress.ip_network("fd00::/64"), ("a", "b"), ())).version == 6


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
