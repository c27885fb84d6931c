"""When a connection is in the redirect table, and what is asked of the table before each write."""

from __future__ import annotations

import asyncio
from collections.abc import Callable

import pytest

from tests.proxy.bed import NETNS, OK, Bed, Peer, soon
from tests.proxy.test_mesh import SWITCH, WEBSOCKET
from userspace_proxy.limits import Limits

GET = b"GET / HTTP/1.1\r\nHost: a\r\n\r\n"


class Membership:
    def __init__(self, log: list[str], room: int, stuck: int) -> None:
        self._stuck = stuck
        self._log = log
        self._room = room
        self.inside = True

    def fits(self, size: int) -> bool:
        return size <= self._room

    def leave(self) -> None:
        self._log.append("leave")
        self.inside = self._stuck > 0
        self._stuck -= 1


class Log(list[str]):
    """What happened to members, and a way to wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._grown = asyncio.Event()

    def append(self, what: str) -> None:
        super().append(what)
        self._grown.set()

    async def until(self, *wanted: str) -> None:
        async with asyncio.timeout(5):
            while self != list(wanted):
                self._grown.clear()
                await self._grown.wait()


class Table:
    """A redirect table that notes who joins; `willing` says whether it takes anybody.

    A member stays inside `stuck` times when it is to leave: its application has not read all.
    """

    def __init__(self, room: int = 1 << 20, stuck: int = 0) -> None:
        self.stuck = stuck
        self.log = Log()
        self.room = room
        self.willing = True
        self.asked: list[tuple[int, str, int, str, int]] = []

    def join(
        self, netns: int, client_addr: str, client_port: int, local_addr: str, local_port: int
    ) -> Membership | None:
        self.asked.append((netns, client_addr, client_port, local_addr, local_port))
        if not self.willing:
            return None
        self.log.append("join")
        return Membership(self.log, self.room, self.stuck)


async def test_a_connection_joins_when_it_has_proven_worth_it(bed: Bed) -> None:
    table = Table()
    await bed.serve(await bed.endpoint(), accelerator=table)
    caller = await bed.caller()
    for count in range(1, 9):
        await caller.ask(GET)
        await bed.record()
        assert table.log == (["join"] if count >= 5 else [])
    host, port = caller.writer.get_extra_info("sockname")
    assert table.asked == [(NETNS, host, port, "127.0.0.1", bed.port)]


async def test_a_request_whose_body_comes_behind_its_head_counts_as_any(bed: Bed) -> None:
    """As Python's http.client sends it: two segments, of which we often read the first alone."""
    table = Table()
    await bed.serve(await bed.endpoint(), accelerator=table)
    caller = await bed.caller()
    for count in range(1, 9):
        caller.send(b"POST / HTTP/1.1\r\nHost: a\r\ncontent-length: 2\r\n\r\n")
        await bed.settle(lambda: any(down.exchange is not None for down in bed.proxy._connections))
        assert not table.log or count > 5  # not before the request is whole
        await caller.ask(b"xy")
        await bed.record()
        assert table.log == (["join"] if count >= 5 else [])


async def test_a_refused_connection_asks_ever_more_rarely(bed: Bed) -> None:
    table = Table()
    table.willing = False
    await bed.serve(await bed.endpoint(), accelerator=table)
    caller = await bed.caller()
    for _ in range(40):
        await caller.ask(GET)
    assert len(table.asked) == 4  # with 5, 10, 20, 40


@pytest.mark.parametrize(
    ("answer", "leaves"),
    [
        (b"HTTP/1.1 200 OK\r\ncontent-length: 5000\r\n\r\n" + bytes(5000), False),
        (b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n", True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 300000\r\n\r\n" + bytes(300_000), True),
        (b"HTTP/1.1 200 OK\r\ncontent-length: 60000\r\n\r\n" + bytes(60_000), True),
        (b"HTTP/1.1 200 OK\r\n\r\nok", True),
    ],
)
async def test_a_member_leaves_before_long_and_endless_answers(bed: Bed, answer: bytes, leaves: bool) -> None:
    table = Table(room=50_000)

    async def talk(peer: Peer) -> None:
        while head := await peer.head():
            peer.send(answer if b"/long" in head else OK)
            if answer.endswith(b"\r\n\r\nok") and b"/long" in head:
                peer.writer.close()
                return

    await bed.serve(await bed.endpoint(talk), accelerator=table)
    caller = await bed.caller()
    for _ in range(5):
        await caller.ask(GET)
    await caller.ask(GET.replace(b"/ ", b"/long "))
    assert table.log == (["join", "leave"] if leaves else ["join"])
    for _ in range(5):
        await caller.ask(GET)
    assert table.log == (["join", "leave", "join"] if leaves else ["join"])


async def test_a_member_leaves_before_a_tunnel(bed: Bed) -> None:
    table = Table()

    async def talk(peer: Peer) -> None:
        while b"websocket" not in await peer.head():
            peer.send(OK)
        assert table.log == ["join"]
        peer.send(SWITCH)
        peer.writer.close()

    await bed.serve(await bed.endpoint(talk), accelerator=table)
    caller = await bed.caller()
    for _ in range(5):
        await caller.ask(GET)
    caller.send(WEBSOCKET)
    await caller.head()
    assert table.log == ["join", "leave"]


async def test_a_member_leaves_when_idle_and_may_come_back(bed: Bed) -> None:
    table = Table()
    await bed.serve(await bed.endpoint(), accelerator=table, limits=Limits(leave_idle=0.05, tick=0.01))
    caller = await bed.caller()
    for _ in range(5):
        await caller.ask(GET)
    assert table.log == ["join"]
    await table.log.until("join", "leave")
    for _ in range(5):
        await caller.ask(GET)
    assert table.log == ["join", "leave", "join"]


async def test_answers_without_a_body_do_not_count(bed: Bed) -> None:
    """They do not show how the application reads: whether by splice, say, as HAProxy does."""
    table = Table()

    async def talk(peer: Peer) -> None:
        while head := await peer.head():
            peer.send(b"HTTP/1.1 204 No Content\r\n\r\n" if b"/none" in head else OK)

    await bed.serve(await bed.endpoint(talk), accelerator=table, limits=Limits(join_after=2))
    caller = await bed.caller()
    for _ in range(6):
        await caller.ask(GET.replace(b"GET / ", b"GET /none "))
    assert table.log == []
    for _ in range(2):
        await caller.ask(GET)
    assert table.log == []
    await caller.ask(GET)
    assert table.log == ["join"]


async def test_a_member_that_does_not_get_out_still_ends_with_its_keep_alive(bed: Bed) -> None:
    table = Table(stuck=1 << 30)
    limits = Limits(leave_idle=0.05, keep_alive=0.3, tick=0.01, join_after=0)
    await bed.serve(await bed.endpoint(), accelerator=table, limits=limits)
    caller = await bed.caller()
    await caller.ask(GET)
    start = asyncio.get_running_loop().time()
    assert await caller.rest() == b""
    assert 0.25 < asyncio.get_running_loop().time() - start < 2.0
    assert table.log[0] == "join" and table.log.count("leave") >= 3


async def test_a_member_that_got_out_late_lives_on_for_its_keep_alive(bed: Bed) -> None:
    table = Table(stuck=2)
    limits = Limits(leave_idle=0.05, tick=0.01, join_after=0)
    await bed.serve(await bed.endpoint(), accelerator=table, limits=limits)
    caller = await bed.caller()
    await caller.ask(GET)
    await table.log.until("join", "leave", "leave", "leave")
    assert (await caller.ask(GET))[0] == 200


@pytest.mark.parametrize("framing", [b"transfer-encoding: chunked\r\n", b""])
async def test_a_member_that_did_not_get_out_is_asked_before_every_write(bed: Bed, framing: bytes) -> None:
    table = Table(stuck=1 << 30)
    more: asyncio.Queue[bytes] = asyncio.Queue()

    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(b"HTTP/1.1 200 OK\r\n" + framing + b"\r\n")
        while piece := await more.get():
            peer.send(b"%x\r\n%b\r\n" % (len(piece), piece) if framing else piece)
        peer.writer.close()

    await bed.serve(await bed.endpoint(talk), accelerator=table, limits=Limits(join_after=0))
    caller = await bed.caller()
    caller.send(GET)
    await caller.head()
    for count in range(1, 4):
        assert table.log == ["join"] + ["leave"] * count
        more.put_nowait(b"piece%d" % count)
        await caller.until(b"piece%d\r\n" % count)
    if not framing:
        more.put_nowait(b"")
        assert await caller.until(b"\r\n\r\n") == b"0\r\n\r\n"
        assert table.log == ["join"] + ["leave"] * 5


async def test_a_member_that_did_not_get_out_is_asked_before_every_write_of_a_tunnel(bed: Bed) -> None:
    table = Table(stuck=1 << 30)

    async def talk(peer: Peer) -> None:
        await peer.head()
        peer.send(SWITCH)
        while data := await peer.reader.read(100):
            peer.send(data)
        peer.writer.close()

    await bed.serve(await bed.endpoint(talk), accelerator=table, limits=Limits(join_after=0))
    caller = await bed.caller()
    caller.send(WEBSOCKET)
    await caller.head()
    for count in range(1, 4):
        assert table.log == ["join"] + ["leave"] * count
        caller.send(b"a")
        await caller.read(1)
    caller.end()
    assert await caller.rest() == b""
    assert table.log == ["join"] + ["leave"] * 5


class Watched:
    """A transport of which somebody is told before each write."""

    def __init__(self, transport: asyncio.Transport, told: Callable[[], None]) -> None:
        self._transport = transport
        self._told = told

    def __getattr__(self, name: str) -> object:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._told()
        self._transport.write(data)


async def test_a_refused_head_is_announced_like_any_answer(bed: Bed) -> None:
    table = Table(room=60)
    await bed.serve(await bed.endpoint(), accelerator=table, limits=Limits(join_after=0))
    caller = await bed.caller()
    await caller.ask(GET)
    down = next(iter(bed.proxy._connections))
    written: list[list[str]] = []
    down.transport = Watched(down.transport, lambda: written.append(list(table.log)))  # type: ignore[assignment]
    caller.send(b"BAD\r\n\r\n")
    assert (await caller.rest()).startswith(b"HTTP/1.1 400 ")
    assert written == [["join", "leave"]]


async def test_nothing_joins_behind_an_answer_that_is_there_at_once(bed: Bed) -> None:
    """A local reply to what asked for close: the connection has ended when the question would be put."""
    table = Table()
    await bed.serve(accelerator=table, limits=Limits(join_after=0))
    for request in (GET, GET.replace(b"\r\n\r\n", b"\r\nConnection: close\r\n\r\n")):
        caller = await bed.caller()
        assert (await caller.ask(request))[0] == 503
    assert table.asked == []


async def test_an_idle_member_ends_soon_when_the_proxy_drains(bed: Bed) -> None:
    table = Table()
    await bed.serve(await bed.endpoint(), accelerator=table, limits=Limits(join_after=0, drain_quiet=0.05))
    caller = await bed.caller()
    await caller.ask(GET)
    await soon(bed.proxy.drain(60.0), 2.0)
    assert table.log == ["join", "leave"] and await caller.rest() == b""
