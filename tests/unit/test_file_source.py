"""The file source on a real directory: what a save, a rename, a half-written file and a ConfigMap swap lead to."""

from __future__ import annotations

import asyncio
import os
from pathlib import Path

import pytest

from meshbpf.registry import file as module
from meshbpf.registry import inotify
from meshbpf.registry.base import Snapshot
from meshbpf.registry.file import FileSource
from meshbpf.schema import files
from meshbpf.tasks import spawn

SERVICE = """\
apiVersion: meshbpf.io/v1
kind: Service
metadata: {{name: {name}}}
spec:
  addresses: [127.96.0.10]
  ports: [{{name: http, port: 80, protocol: http}}]
"""


def service(name: str) -> str:
    return SERVICE.format(name=name)


def names(snapshot: Snapshot) -> list[str]:
    return [service.name for service in snapshot.services]


class Watching:
    """The snapshots of one source, each of which must come within ten seconds."""

    def __init__(self, *paths: Path) -> None:
        self.source = FileSource(paths)
        self.snapshots = self.source.watch()

    async def next(self) -> Snapshot:
        async with asyncio.timeout(10):
            return await anext(self.snapshots)

    async def until(self, *wanted: str, error: bool = False) -> Snapshot:
        """The first snapshot with these services; a save may be seen in two parts, so others may come before it."""
        while True:
            snapshot = await self.next()
            if names(snapshot) == list(wanted) and bool(snapshot.error) is error:
                return snapshot

    async def __aenter__(self) -> Watching:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.snapshots.aclose()


async def test_a_saved_change_is_a_new_snapshot(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(service("orders"))
    async with Watching(path) as files:
        first = await files.next()
        assert (names(first), first.error, first.source) == (["orders"], "", "files")
        path.write_text(service("ledger"))
        await files.until("ledger")


async def test_renaming_over_the_file_is_a_change_more_than_once(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(service("a"))
    async with Watching(path) as files:
        await files.until("a")
        for name in ("b", "c", "d"):
            temporary = tmp_path / "mesh.yaml.new"
            temporary.write_text(service(name))
            temporary.rename(path)
            await files.until(name)


async def test_a_rename_is_not_kept_waiting_by_the_draft_that_was_written_before_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inotify, "SPACING", 5.0)
    path, draft = tmp_path / "mesh.yaml", tmp_path / "mesh.yaml.new"
    path.write_text(service("a"))
    async with Watching(path) as files:
        await files.until("a")
        draft.write_text(service("b"))
        following = spawn(files.next(), "next")
        await asyncio.sleep(inotify.BREATH * 4)  # the draft has been noticed by now
        begun = asyncio.get_running_loop().time()
        draft.rename(path)
        assert names(await following) == ["b"]
        assert asyncio.get_running_loop().time() - begun < inotify.SPACING / 5


async def test_a_bad_file_keeps_the_last_good_snapshot_and_says_where_it_is_bad(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(service("orders"))
    async with Watching(path) as files:
        good = await files.until("orders")
        path.write_text(service("orders").replace("port: 80", "port: 80000"))
        bad = await files.until("orders", error=True)
        expected = f"{path}:6:30: spec.ports[0].port must be a whole number from 1 to 65535, got 80000"
        assert bad.error == expected
        assert bad.services == good.services
        path.write_text(service("repaired"))
        await files.until("repaired")


async def test_a_half_written_file_keeps_the_last_good_snapshot_until_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(service("orders"))
    async with Watching(path) as files:
        await files.until("orders")
        whole = service("ledger")
        with path.open("w") as file:
            file.write(whole[:-10])
            file.flush()
            half = await files.until("orders", error=True)
            assert half.error.startswith(f"{path}:6:41: not YAML: ")
            file.write(whole[-10:])
        await files.until("ledger")


async def test_a_file_that_is_written_in_parts_is_read_when_it_is_closed(tmp_path: Path) -> None:
    """Each part alone would be a mesh, and so would what is there when another file is saved meanwhile."""
    path, other = tmp_path / "mesh.yaml", tmp_path / "other.yaml"
    path.write_text(service("a"))
    async with Watching(tmp_path) as files:
        await files.until("a")
        following = spawn(files.next(), "next")
        with path.open("w") as file:
            for name in "bcd":
                file.write("---\n" + service(name).replace("0.10", f"0.{ord(name)}"))
                file.flush()
                other.write_text(f"# {name}\n")
                await asyncio.sleep(module.QUIET_SECONDS / 4)
            assert not following.done()
        begun = asyncio.get_running_loop().time()
        assert names(await following) == ["b", "c", "d"]
        assert asyncio.get_running_loop().time() - begun < module.QUIET_SECONDS / 2


async def test_what_begins_to_be_written_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(service("a"))
    read = module.files.texts
    async with Watching(path) as files:
        await files.until("a")

        def meanwhile(paths: list[Path]) -> list[tuple[str, str]]:
            found = read(paths)
            if "name: b" in found[0][1]:
                path.write_text(service("c"))
            return found

        monkeypatch.setattr(module.files, "texts", meanwhile)
        path.write_text(service("b"))
        assert names(await files.next()) == ["c"]


def test_a_file_is_being_written_until_it_is_closed_or_replaced() -> None:
    def after(*events: tuple[int, str]) -> set[str]:
        found = inotify.still_open(frozenset(), [inotify.Event(1, mask, name) for mask, name in events])
        return {name for _watch, name in found}

    assert after((inotify.MODIFY, "a"), (inotify.CREATE, "b")) == {"a", "b"}
    assert after((inotify.CREATE | inotify.ISDIR, "folder"), (inotify.ATTRIB, "a")) == set()
    for end in (inotify.CLOSE_WRITE, inotify.MOVED_TO, inotify.MOVED_FROM, inotify.DELETE):
        assert after((inotify.MODIFY, "a"), (inotify.MODIFY, "b"), (end, "a")) == {"b"}
    assert after((inotify.MODIFY, "a"), (inotify.OVERFLOW, "")) == set()


async def test_a_file_that_was_truncated_keeps_what_it_said_until_something_is_written(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(service("orders"))
    async with Watching(path) as files:
        await files.until("orders")
        path.write_text("")
        empty = await files.until("orders", error=True)
        assert empty.error.startswith(f"{path}:1:1: is empty, so what it said before stays")
        path.write_text("# nothing any more\n")
        await files.until()


async def test_a_file_that_is_bad_from_the_start_gives_an_empty_snapshot_with_the_error(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text("kind: [")
    async with Watching(path) as files:
        first = await files.next()
        assert first.services == ()
        assert first.error.startswith(f"{path}:1:8: not YAML")


async def test_files_come_and_go_in_a_directory(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(service("a"))
    async with Watching(tmp_path) as files:
        await files.until("a")
        (tmp_path / "b.json").write_text(
            '{"apiVersion": "meshbpf.io/v1", "kind": "Service", "metadata": {"name": "b"},'
            ' "spec": {"ports": [{"name": "tcp", "port": 1}]}}'
        )
        (tmp_path / ".#c.yaml").write_text("an editor's lock")
        await files.until("a", "b")
        (tmp_path / "a.yaml").unlink()
        await files.until("b")


async def test_a_path_that_does_not_exist_yet_is_an_error_until_it_does(tmp_path: Path) -> None:
    path = tmp_path / "later" / "mesh.yaml"
    async with Watching(path) as files:
        assert (await files.next()).error == f"{path}: cannot be read: No such file or directory"
        path.parent.mkdir()
        path.write_text(service("orders"))
        await files.until("orders")


async def test_a_configmap_swap_is_one_change(tmp_path: Path) -> None:
    def publish(name: str) -> None:
        """As the kubelet does: a new directory, then one rename of the link that all files go through."""
        (tmp_path / f"..{name}").mkdir()
        (tmp_path / f"..{name}" / "mesh.yaml").write_text(service(name))
        (tmp_path / "..data_tmp").symlink_to(f"..{name}")
        (tmp_path / "..data_tmp").rename(tmp_path / "..data")

    publish("one")
    (tmp_path / "mesh.yaml").symlink_to("..data/mesh.yaml")
    async with Watching(tmp_path) as whole, Watching(tmp_path / "mesh.yaml") as single:
        await whole.until("one")
        await single.until("one")
        publish("two")
        assert names(await whole.next()) == ["two"]
        assert names(await single.next()) == ["two"]


async def test_a_change_behind_a_symbolic_link_to_elsewhere_is_seen(tmp_path: Path) -> None:
    (tmp_path / "real").mkdir()
    (tmp_path / "etc").mkdir()
    (tmp_path / "real" / "shop.yaml").write_text(service("a"))
    (tmp_path / "etc" / "mesh.yaml").symlink_to(tmp_path / "real" / "shop.yaml")
    assert tmp_path / "real" in module.watched([tmp_path / "etc"])
    async with Watching(tmp_path / "etc") as files:
        await files.until("a")
        (tmp_path / "real" / "shop.yaml").write_text(service("b"))
        await files.until("b")


async def test_reload_tells_even_when_nothing_changed(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(service("orders"))
    async with Watching(path) as files:
        first = await files.next()
        files.source.reload()
        assert await files.next() == first


async def test_without_notifications_a_look_every_second_finds_the_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise OSError("too many inotify watches")

    monkeypatch.setattr("meshbpf.registry.file.Inotify", refuse)
    path = tmp_path / "mesh.yaml"
    path.write_text(service("a"))
    async with Watching(path) as files:
        await files.until("a")
        path.write_text(service("b"))
        await files.until("b")
    assert caplog.text.count("looking every second instead error=too many inotify watches") == 1


def test_a_first_look_raises_every_fault_with_its_position(tmp_path: Path) -> None:
    path = tmp_path / "mesh.yaml"
    path.write_text(service("A").replace("80", "0"))
    with pytest.raises(module.files.ConfigErrors) as caught:
        FileSource([path]).first(module.files.texts([path]))
    assert [error.where for error in caught.value.errors] == [f"{path}:3:18", f"{path}:6:30"]


def test_the_watched_directories_stay_few(tmp_path: Path) -> None:
    os.symlink("loop.yaml", tmp_path / "loop.yaml")
    assert module.watched([tmp_path / "loop.yaml"]) == [tmp_path]


@pytest.mark.parametrize("then", ["kind: Nonsense\n", "", "{"])
async def test_what_goes_bad_between_the_start_and_the_watch_keeps_what_was_read(tmp_path: Path, then: str) -> None:
    """`run` reads, then loads a server: meanwhile somebody writes."""
    path = tmp_path / "mesh.yaml"
    path.write_text(service("orders"))
    async with Watching(path) as watching:
        watching.source.first(files.texts([path]))
        path.write_text(then)
        assert names(await watching.next()) == ["orders"]
        bad = await watching.next()
        assert names(bad) == ["orders"] and bad.error and bad.stale
        path.write_text(service("carts"))
        await watching.until("carts")


async def test_files_that_are_swapped_while_they_are_read_are_read_as_a_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """carts moves from one file to the other: no reading may find it in neither."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, left, right in ((old, ("orders",), ("carts",)), (new, ("orders", "carts"), ("users",))):
        folder.mkdir()
        for name, services in (("a.yaml", left), ("b.yaml", right)):
            text = "---\n".join(service(each).replace("0.10", f"0.{ord(each[0])}") for each in services)
            (folder / name).write_text(text)
    data = tmp_path / "conf"
    data.symlink_to("old")
    genuine = files.texts
    swapped = []

    def swap_after_reading(paths: list[Path]) -> list[tuple[str, str]]:
        found = genuine(paths)
        if not swapped:
            swapped.append(True)
            half = [pair for pair in found if pair[0].endswith("a.yaml")]
            (tmp_path / "next").symlink_to("new")
            (tmp_path / "next").rename(data)
            return half + [pair for pair in genuine(paths) if pair[0].endswith("b.yaml")]
        return found

    monkeypatch.setattr(files, "texts", swap_after_reading)
    async with Watching(data) as watching:
        assert sorted(names(await watching.next())) == ["carts", "orders", "users"]
    assert swapped
