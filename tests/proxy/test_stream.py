"""Streams and their poller: order, back-pressure, ends, and that one bad connection costs only itself."""

from __future__ import annotations

import asyncio
import contextlib
import os
import resource
import socket
import struct
from collections.abc import Callable, Iterator
from select import EPOLLIN
from typing import Any, cast

import pytest

from tests.proxy.bed import soon
from userspace_proxy.poller import Acceptor, Poller
from userspace_proxy.stream import Stream

MIB = 2**20


class Told(asyncio.Protocol):
    """Notes what a stream tells it; `answer` is called with what comes."""

    def __init__(self, answer: Callable[[Told, bytes], None] | None = None, keep: bool = True) -> None:
        self.stream: Stream = cast(Stream, None)
        self.answer = answer
        self.keep = keep
        self.data = bytearray()
        self.told: list[str] = []
        self.error: Exception | None = None
        self.lost = asyncio.Event()
        self.moved = asyncio.Event()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.stream = cast(Stream, transport)

    def data_received(self, data: bytes) -> None:
        self.data += data
        self.moved.set()
        if self.answer is not None:
            self.answer(self, data)

    def eof_received(self) -> bool:
        self.told.append("eof")
        self.moved.set()
        return self.keep

    def pause_writing(self) -> None:
        self.told.append("pause")

    def resume_writing(self) -> None:
        self.told.append("resume")
        self.moved.set()

    def connection_lost(self, exc: Exception | None) -> None:
        self.told.append("lost")
        self.error = exc
        self.lost.set()

    async def has(self, size: int) -> None:
        while len(self.data) < size:
            self.moved.clear()
            await soon(self.moved.wait())


def pair(listener: socket.socket, poller: Poller, protocol: Told) -> socket.socket:
    """A stream told to `protocol`, and the socket of its peer."""
    peer = socket.create_connection(listener.getsockname())
    ours, _address = listener.accept()
    ours.setblocking(False)
    peer.setblocking(False)
    poller.connected(ours, protocol)
    return peer


async def read(peer: socket.socket, size: int) -> bytes:
    loop, data = asyncio.get_running_loop(), bytearray()
    while len(data) < size and (more := await soon(loop.sock_recv(peer, MIB))):
        data += more
    return bytes(data)


async def test_what_is_there_is_read_before_anybody_waits(poller: Poller, listener: socket.socket) -> None:
    peer = socket.create_connection(listener.getsockname())
    peer.sendall(b"hello")
    ours, _address = listener.accept()
    ours.setblocking(False)
    told = Told()
    poller.connected(ours, told)
    assert told.data == b"hello"
    peer.close()


async def test_what_the_kernel_does_not_take_is_sent_in_order(poller: Poller, listener: socket.socket) -> None:
    told = Told()
    with pair(listener, poller, told) as peer:
        parts = [os.urandom(MIB) for _ in range(12)] + [b"", b"end"]
        told.stream.set_write_buffer_limits(high=2 * MIB)
        taken = b""
        for part in parts:
            told.stream.write(part)
            with contextlib.suppress(BlockingIOError):
                taken += peer.recv(MIB // 4)  # now there may be room for what must not overtake
        told.stream.write_eof()
        assert told.told == ["pause"] and told.stream.get_write_buffer_size() > 2 * MIB
        assert taken + await read(peer, 32 * MIB) == b"".join(parts)  # to the FIN
        assert told.told == ["pause", "resume"] and told.stream.get_write_buffer_size() == 0
        told.stream.write(b"behind the FIN")
        peer.shutdown(socket.SHUT_WR)
        await soon(told.moved.wait())
        told.stream.close()
        await soon(told.lost.wait())
        assert told.error is None


async def test_close_sends_what_is_unsent_first(poller: Poller, listener: socket.socket) -> None:
    told = Told()
    with pair(listener, poller, told) as peer:
        told.stream.write(bytes(8 * MIB))
        told.stream.close()
        told.stream.write(b"too late")
        assert told.stream.is_closing() and not told.lost.is_set()
        assert len(await read(peer, 16 * MIB)) == 8 * MIB
        await soon(told.lost.wait())
        assert told.stream.get_write_buffer_size() == 0


async def test_abort_sends_nothing_more_and_is_told_behind_the_call(poller: Poller, listener: socket.socket) -> None:
    told = Told()
    with pair(listener, poller, told) as peer:
        told.stream.write(bytes(32 * MIB))
        told.stream.abort()
        told.stream.abort()
        assert "lost" not in told.told
        assert told.stream.get_extra_info("socket") is None  # its number may be somebody else's by now
        await soon(told.lost.wait())
        assert told.told.count("lost") == 1 and told.error is None
        assert len(await read(peer, 32 * MIB)) < 32 * MIB


async def test_a_paused_stream_is_not_read_and_goes_on_where_it_was(poller: Poller, listener: socket.socket) -> None:
    told = Told(lambda self, _data: self.stream.pause_reading())
    with pair(listener, poller, told) as peer:
        peer.sendall(b"x" * 10)
        await told.has(10)
        peer.sendall(b"y" * 10)
        peer.shutdown(socket.SHUT_WR)
        other = Told()
        with pair(listener, poller, other) as witness:  # a turn later nothing more has come
            witness.sendall(b"z")
            await other.has(1)
        assert told.data == b"x" * 10 and not told.stream.is_reading()
        assert set(poller._watched.values()) == {other.stream}  # nobody is woken for what is not read
        told.answer = None
        told.stream.resume_reading()
        await told.has(20)
        while "eof" not in told.told:
            told.moved.clear()
            await soon(told.moved.wait())
        assert told.data == b"x" * 10 + b"y" * 10


async def test_an_end_that_nobody_wants_to_outlive_closes(poller: Poller, listener: socket.socket) -> None:
    told = Told(keep=False)
    with pair(listener, poller, told) as peer:
        peer.shutdown(socket.SHUT_WR)
        await soon(told.lost.wait())
        assert told.told == ["eof", "lost"] and await read(peer, 1) == b""


@pytest.mark.parametrize("writing", [False, True])
async def test_a_reset_is_told_once_with_its_error(poller: Poller, listener: socket.socket, writing: bool) -> None:
    told = Told()
    peer = pair(listener, poller, told)
    if writing:
        told.stream.pause_reading()
        told.stream.write(bytes(16 * MIB))
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    peer.close()
    await soon(told.lost.wait())
    assert isinstance(told.error, ConnectionError) and told.told.count("lost") == 1
    told.stream.write(b"nobody hears")
    told.stream.resume_reading()
    assert told.stream.is_closing() and told.stream.get_write_buffer_size() == 0


async def test_a_bug_in_one_protocol_costs_only_its_connection(poller: Poller, listener: socket.socket) -> None:
    def bug(_self: Told, _data: bytes) -> None:
        raise ZeroDivisionError

    heard: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda _loop, context: heard.append(context))
    bad, good = Told(bug), Told()
    with pair(listener, poller, bad) as worse, pair(listener, poller, good) as better:
        worse.sendall(b"x")
        better.sendall(b"y")
        await soon(bad.lost.wait())
        await good.has(1)
        assert [type(context["exception"]) for context in heard] == [ZeroDivisionError]
        better.sendall(b"z")
        await good.has(2)


async def test_a_descriptor_used_again_in_the_same_turn_hears_nothing_of_the_old_one(
    poller: Poller, listener: socket.socket
) -> None:
    """Two are ready; the one told first closes the other, whose number a third connection gets at once."""
    third = Told()
    third_peer = socket.create_connection(listener.getsockname())
    spare, _address = listener.accept()
    spare.setblocking(False)

    def swap(self: Told, _data: bytes) -> None:
        other = right if self is left else left
        number = other.stream.get_extra_info("socket").fileno()
        other.stream.abort()
        os.dup2(spare.fileno(), number)
        spare.close()
        Stream(poller, number, None).begin(third)

    left, right = Told(swap), Told(swap)
    with third_peer, pair(listener, poller, left) as one, pair(listener, poller, right) as two:
        one.sendall(b"x")
        two.sendall(b"x")
        while third.stream is None:
            await asyncio.sleep(0)
        third_peer.sendall(b"hello")
        await third.has(5)
        assert third.told == [] and third.data == b"hello" and len(left.data) + len(right.data) == 1
        third.stream.abort()


async def test_timers_have_their_turn_while_there_is_always_something_to_do(poller: Poller) -> None:
    class Busy:
        """Is ready and stays so: it does not read what there is."""

        passes = 0

        def ready(self, mask: int) -> None:
            self.passes += 1
            if self.passes > 100_000:
                raise RuntimeError("nobody else had a turn")

        def abort(self) -> None:
            poller.watch(reader.fileno(), self, 1, 0)

    busy = Busy()
    reader, writer = socket.socketpair()
    with reader, writer:
        writer.send(b"x")
        poller.watch(reader.fileno(), busy, 0, EPOLLIN)
        await asyncio.sleep(0.001)
        assert 0 < busy.passes < 100_000
        busy.abort()


@pytest.fixture
def few_descriptors() -> Iterator[None]:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


async def test_without_descriptors_callers_wait_and_are_served_later(
    poller: Poller, listener: socket.socket, few_descriptors: None, caplog: pytest.LogCaptureFixture
) -> None:
    loop = asyncio.get_running_loop()
    made: list[Told] = []

    def make() -> Told:
        made.append(Told(lambda self, data: self.stream.write(data)))
        return made[-1]

    acceptor = Acceptor(poller, listener.dup(), make)
    callers = [socket.socket() for _ in range(3)]
    highest = max(int(name) for name in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{name}"))
    resource.setrlimit(resource.RLIMIT_NOFILE, (highest + 1, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
    hoard = []
    try:
        while True:
            hoard.append(os.dup(0))
    except OSError:
        pass
    for caller in callers:
        caller.setblocking(False)
        await soon(loop.sock_connect(caller, listener.getsockname()))
        await soon(loop.sock_sendall(caller, b"hello"))
    while "no descriptor" not in caplog.text:
        await asyncio.sleep(0)
    assert not made
    for number in hoard:
        os.close(number)
    resource.setrlimit(resource.RLIMIT_NOFILE, (resource.getrlimit(resource.RLIMIT_NOFILE)[1],) * 2)
    for caller in callers:
        assert await read(caller, 5) == b"hello"
    acceptor.close()
    for caller, told in zip(callers, made, strict=True):
        caller.close()
        told.stream.close()


async def test_a_closed_acceptor_takes_nothing_though_the_socket_lives_on(
    poller: Poller, listener: socket.socket
) -> None:
    loop = asyncio.get_running_loop()
    made: list[Told] = []

    def make() -> Told:
        made.append(Told(lambda self, data: self.stream.write(data)))
        return made[-1]

    first = Acceptor(poller, listener.dup(), make)
    first.close()
    assert not poller._watched  # or it would be woken for callers that it cannot take
    with socket.socket() as caller:
        caller.setblocking(False)
        await soon(loop.sock_connect(caller, listener.getsockname()))
        await soon(loop.sock_sendall(caller, b"hello"))
        for _ in range(20):
            await asyncio.sleep(0)
        assert not made
        second = Acceptor(poller, listener.dup(), make)
        assert await read(caller, 5) == b"hello"
        second.close()
        made[0].stream.close()
