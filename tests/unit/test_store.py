"""The store: what was answered is on the disk; a store in trouble says so and never stops the registry."""

from __future__ import annotations

import ipaddress
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

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
