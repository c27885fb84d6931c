"""Small writes are held within a turn of the poller, and only the clock can tell: order, ends, errors, counts."""

from __future__ import annotations

import asyncio
import os
import select
import socket
import struct
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest

from meshbpf.record import Record
from tests.proxy.bed import Bed, soon
from tests.proxy.test_redirect import GET, Membership, Table
from tests.proxy.test_stream import MIB, Told, pair, read
from userspace_proxy.acceleration import Shortcut
from userspace_proxy.outgoing import HELD
from userspace_proxy.poller import HOLDERS, Poller
from userspace_proxy.stream import Stream

Act = Callable[[], object]


class Turn:
    """Streams and their peers, and what is done to them within one turn of the poller."""

    def __init__(self, listener: socket.socket, poller: Poller) -> None:
        self._listener = listener
        self._peers = ExitStack()
        self.poller = poller

    def add(self, told: Told | None = None) -> tuple[Told, socket.socket]:
        told = told or Told()
        return told, self._peers.enter_context(pair(self._listener, self.poller, told))

    def do(self, *acts: Act) -> None:
        """One turn, in which each of `acts` is done in an event of its own, in this order."""
        failed: list[Exception] = []
        done: list[Act] = []

        def told(act: Act) -> Told:
            def answer(_told: Told, _data: bytes) -> None:
                done.append(act)
                try:
                    act()
                except Exception as error:  # noqa: BLE001  the poller would take it for a bug of the connection
                    failed.append(error)

            return Told(answer)

        for _told, peer in [self.add(told(act)) for act in acts]:
            peer.send(b"x")
        self.poller._turn()
        for error in failed:
            raise error
        assert done == list(acts) and not self.poller.held

    def close(self) -> None:
        self._peers.close()


@pytest.fixture
def turn(listener: socket.socket, poller: Poller) -> Iterator[Turn]:
    made = Turn(listener, poller)
    yield made
    made.close()


def arrived(peer: socket.socket) -> bytes:
    """What is there to read now."""
    try:
        return peer.recv(16 * MIB)
    except BlockingIOError:
        return b""


def fill(stream: Stream) -> int:
    """Fill the kernel's buffers behind the stream's back, and say how much they took: the next write meets EAGAIN."""
    sock, size = stream.get_extra_info("socket"), 0
    while True:
        try:
            size += sock.send(bytes(MIB))
        except BlockingIOError:
            return size


def reset(stream: Stream, peer: socket.socket) -> None:
    """`peer` resets; only a write of `stream` can meet that."""
    stream.pause_reading()
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    poll = select.poll()
    poll.register(stream.get_extra_info("socket"), 0)
    assert poll.poll(5000)  # it has come: POLLERR and POLLHUP are always told


async def told_of(told: Told, what: str) -> None:
    while what not in told.told:
        told.moved.clear()
        await soon(told.moved.wait())


async def test_a_small_write_is_sent_at_the_end_of_the_turn(turn: Turn) -> None:
    told, peer = turn.add()
    seen: list[bytes] = []

    def write() -> None:
        told.stream.write(b"one ")
        told.stream.write(bytearray(b"two"))
        seen.append(arrived(peer))

    turn.do(write, lambda: seen.append(arrived(peer)))
    assert seen == [b"", b""] and arrived(peer) == b"one two"
    assert told.stream.get_write_buffer_size() == 0 and told.told == []


async def test_outside_of_a_turn_nothing_is_held(turn: Turn) -> None:
    told, peer = turn.add()
    turn.do(lambda: None)
    told.stream.write(b"now")
    assert arrived(peer) == b"now"


async def test_not_more_than_a_few_connections_are_held(turn: Turn) -> None:
    ends = [turn.add() for _ in range(HOLDERS)]
    seen: list[bytes] = []
    writes = [lambda told=told: told.stream.write(b"x") for told, _peer in ends]
    turn.do(
        *writes[:-1], lambda: seen.append(arrived(ends[0][1])), writes[-1], lambda: seen.append(arrived(ends[0][1]))
    )
    assert seen == [b"", b"x"]


async def test_a_write_that_would_be_too_much_sends_what_is_held(turn: Turn) -> None:
    told, peer = turn.add()
    first, second = os.urandom(HELD - 10), os.urandom(20)

    def write() -> None:
        told.stream.write(first)
        told.stream.write(second)
        assert arrived(peer) == first and told.stream.get_write_buffer_size() == 20

    turn.do(write)
    assert arrived(peer) == second


@pytest.mark.parametrize("size", [HELD, HELD + 1, 8 * MIB])
async def test_a_big_write_does_not_overtake_what_is_held(turn: Turn, size: int) -> None:
    told, peer = turn.add()
    parts = [b"first", os.urandom(size), b"last"]

    def write() -> None:
        for part in parts:
            told.stream.write(part)
        told.stream.write_eof()

    turn.do(write)
    assert await read(peer, 16 * MIB) == b"".join(parts)


# back-pressure


async def test_what_the_kernel_does_not_take_is_kept_and_sent_in_order(turn: Turn) -> None:
    told, peer = turn.add()
    size = fill(told.stream)
    parts = [b"held ", b"as well ", os.urandom(2 * MIB), b" end"]

    def write() -> None:
        told.stream.write(parts[0])
        told.stream.write(parts[1])
        assert told.stream.get_write_buffer_size() == 13 and told.told == []
        told.stream.write(parts[2])
        told.stream.write(parts[3])

    turn.do(write)
    assert told.told == ["pause"] and told.stream.get_write_buffer_size() == sum(map(len, parts))
    assert (await read(peer, size + sum(map(len, parts))))[size:] == b"".join(parts)
    await told_of(told, "resume")
    assert told.told == ["pause", "resume"] and told.stream.get_write_buffer_size() == 0


async def test_held_bytes_above_the_limit_pause_only_when_the_kernel_refuses_them(turn: Turn) -> None:
    told, peer = turn.add()
    told.stream.set_write_buffer_limits(high=100)
    turn.do(lambda: told.stream.write(bytes(1000)))
    assert told.told == [] and len(arrived(peer)) == 1000
    size = fill(told.stream)
    turn.do(lambda: told.stream.write(bytes(1000)))
    assert told.told == ["pause"] and told.stream.get_write_buffer_size() == 1000
    await read(peer, size + 1000)
    await told_of(told, "resume")


async def test_what_is_written_when_there_is_room_again_is_sent_in_the_same_turn(turn: Turn) -> None:
    told, peer = turn.add()
    other, other_peer = turn.add()
    told.resume_writing = lambda: other.stream.write(b"go on")  # type: ignore[method-assign]
    told.stream.write(bytes(32 * MIB))
    assert told.told == ["pause"]
    while arrived(peer):
        turn.poller._turn()
    assert arrived(other_peer) == b"go on" and not turn.poller.held


# ends


async def test_a_close_comes_behind_what_is_held(turn: Turn) -> None:
    told, peer = turn.add()
    at_once, at_once_peer = turn.add()

    def end() -> None:
        told.stream.write(b"bye")
        told.stream.close()
        told.stream.write(b"too late")
        assert told.stream.is_closing() and told.stream.get_write_buffer_size() == 3
        at_once.stream.close()
        assert at_once.stream.get_extra_info("socket") is None

    watch, watched = turn.poller.watch, []
    turn.poller.watch = lambda fd, one, *masks: (watched.append(one), watch(fd, one, *masks))[1]  # type: ignore[method-assign]
    turn.do(end)
    assert told.stream not in watched  # epoll is not asked for what need not be awaited
    assert told.told == at_once.told == ["lost"] and told.error is None
    assert arrived(peer) == b"bye" and peer.recv(1) == b"" and at_once_peer.recv(1) == b""


async def test_a_close_waits_for_the_kernel_to_take_what_was_held(turn: Turn) -> None:
    told, peer = turn.add()
    size = fill(told.stream)

    def end() -> None:
        told.stream.write(b"bye")
        told.stream.close()

    turn.do(end)
    assert told.told == []
    assert (await read(peer, size + 100))[size:] == b"bye"
    await soon(told.lost.wait())
    assert told.error is None


@pytest.mark.parametrize("full", [False, True])
async def test_a_half_close_comes_behind_what_is_held_and_leaves_the_other_half(turn: Turn, full: bool) -> None:
    told, peer = turn.add()
    size = fill(told.stream) if full else 0

    def end() -> None:
        told.stream.write(b"that is all")
        told.stream.write_eof()
        told.stream.write(b"behind the FIN")

    turn.do(end)
    assert (await read(peer, size + 100))[size:] == b"that is all"
    peer.send(b"answer")
    await told.has(6)
    assert told.told == [] and told.stream.get_write_buffer_size() == 0


async def test_an_abort_does_not_take_back_what_was_written_before(turn: Turn) -> None:
    told, peer = turn.add()

    def end() -> None:
        told.stream.write(b"part of")
        told.stream.abort()

    turn.do(end)
    assert told.told == ["lost"] and arrived(peer) == b"part of" and peer.recv(1) == b""


# errors


async def test_a_peer_that_resets_before_the_end_of_the_turn_costs_only_itself(turn: Turn) -> None:
    told, peer = turn.add()
    other, other_peer = turn.add()

    def write() -> None:
        told.stream.write(b"nobody hears")
        other.stream.write(b"hello")
        reset(told.stream, peer)

    turn.do(write)
    assert told.told == ["lost"] and isinstance(told.error, ConnectionError)
    assert told.stream.get_write_buffer_size() == 0 and arrived(other_peer) == b"hello"


async def test_a_peer_that_has_reset_is_met_by_a_big_write_behind_a_held_one(turn: Turn) -> None:
    told, peer = turn.add()

    def write() -> None:
        told.stream.write(b"nobody")
        reset(told.stream, peer)
        told.stream.write(bytes(MIB))
        assert told.stream.is_closing() and told.told == []  # not within the call
        told.stream.write(b"hears")

    turn.do(write)
    assert told.told == ["lost"] and isinstance(told.error, ConnectionError)


async def test_what_is_written_behind_a_reset_that_was_met_is_not_held(turn: Turn) -> None:
    told, peer = turn.add()

    def write() -> None:
        told.stream.write(bytes(HELD))
        reset(told.stream, peer)
        told.stream.write(b"too much")
        assert told.stream.is_closing() and told.stream.get_write_buffer_size() == 0

    turn.do(write)
    assert told.told == ["lost"]


async def test_an_end_that_is_met_in_telling_another_is_told_in_the_same_turn(turn: Turn) -> None:
    """No event will come for it later: it is not read, and all its peer had to say is said."""
    told, _peer = turn.add()
    other, other_peer = turn.add()
    third, third_peer = turn.add()
    told.connection_lost = lambda _exc: other.stream.write(b"he is gone")  # type: ignore[method-assign]
    other.connection_lost = lambda _exc: third.stream.write(b"both are")  # type: ignore[method-assign]
    reset(other.stream, other_peer)
    turn.do(told.stream.abort)
    assert arrived(third_peer) == b"both are"


async def test_a_bug_costs_its_connection_and_nothing_that_was_written(turn: Turn) -> None:
    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: heard.append(context))
    other, other_peer = turn.add()

    def bug(told: Told, _data: bytes) -> None:
        told.stream.write(b"as far as I came")
        other.stream.write(b"hello")
        raise ZeroDivisionError

    bad, bad_peer = turn.add(Told(bug))
    bad_peer.send(b"x")
    turn.do(lambda: other.stream.write(b" again"))
    assert [type(context["exception"]) for context in heard] == [ZeroDivisionError]
    assert arrived(other_peer) == b"hello again"
    assert bad.told == ["lost"] and arrived(bad_peer) == b"as far as I came"


async def test_a_bug_in_a_send_costs_only_its_connection(turn: Turn) -> None:
    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: heard.append(context))
    bad, _bad_peer = turn.add()
    other, other_peer = turn.add()
    bad.pause_writing = lambda: 1 // 0  # type: ignore[assignment]
    bad.stream.set_write_buffer_limits(high=1)
    fill(bad.stream)

    def write() -> None:
        bad.stream.write(b"more")
        other.stream.write(b"hello")

    turn.do(write)
    assert [type(context["exception"]) for context in heard] == [ZeroDivisionError]
    assert bad.told == ["lost"] and arrived(other_peer) == b"hello"


async def test_a_turn_that_is_broken_off_leaves_nothing_held_or_untold(turn: Turn) -> None:
    told, peer = turn.add()
    ended, _ended_peer = turn.add()

    def stop(_told: Told, _data: bytes) -> None:
        told.stream.write(b"hello")
        ended.stream.abort()
        raise asyncio.CancelledError  # no Exception: it goes through to the loop

    _bad, bad_peer = turn.add(Told(stop))
    bad_peer.send(b"x")
    with pytest.raises(asyncio.CancelledError):
        turn.poller._turn()
    await soon(ended.lost.wait())
    assert arrived(peer) == b"hello" and not turn.poller.turning
    told.stream.write(b" there")
    assert arrived(peer) == b" there"


# in the proxy


async def test_a_shutdown_in_the_turn_of_an_answer_does_not_cost_it(bed: Bed) -> None:
    held: list[int] = []

    def sink(_record: Record) -> None:
        for connection in list(bed.proxy._connections):
            held.append(connection.transport.get_write_buffer_size())
            connection.abort()  # as the end of a drain does

    await bed.serve(await bed.endpoint())
    bed.proxy.sink = sink
    caller = await bed.caller()
    status, _head, body = await caller.ask(GET)
    assert (status, body, await caller.rest()) == (200, b"ok", b"") and held[0] > 0


async def test_who_has_something_unsent_does_not_join_the_redirect_table(turn: Turn) -> None:
    table = Table()
    told, _peer = turn.add()
    told.stream._peer = ("127.0.0.1", 1)
    shortcut = Shortcut(table, 0)

    def asked() -> None:
        told.stream.write(b"an answer")
        shortcut.asked(7, told.stream)
        assert not shortcut.joined and not table.asked

    turn.do(asked)
    turn.do(lambda: shortcut.asked(7, told.stream))
    assert shortcut.joined


async def test_a_member_is_never_asked_for_room_with_something_unsent(
    bed: Bed, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The kernel's room is without what it has not been given: two answers that fit one by one would not fit together,
    and the second would go by TCP to a reader that sees none."""
    unsent: list[int] = []

    def fits(_self: Membership, _size: int) -> bool:
        unsent.extend(each.transport.get_write_buffer_size() for each in bed.proxy._connections)
        return True

    monkeypatch.setattr(Membership, "fits", fits)
    table = Table()
    await bed.serve(await bed.endpoint(), accelerator=table)
    caller = await bed.caller()
    for _ in range(5):
        await caller.ask(GET)
    assert table.log == ["join"] and unsent == [0]
    bed.proxy.use(bed.mesh())
    caller.send(GET * 3)  # answered at once, in one turn
    for _ in range(3):
        assert (await caller.answer())[0] == 503
    assert unsent == [0] * 4
