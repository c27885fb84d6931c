"""Joining, redirecting both ways, leaving and coming back: what a member may rely on."""

from __future__ import annotations

import fcntl
import os
import select
import socket
import struct
import termios

import pytest

from loader import abi, redirect
from loader.rig import Rig
from meshbpf.reason import Reason
from tests.support.machine import until


def unread(sock: socket.socket) -> int:
    raw = fcntl.ioctl(sock.fileno(), termios.FIONREAD, bytes(4))
    return int(struct.unpack("i", raw)[0])


def tcp_sent(sock: socket.socket) -> int:
    """Bytes that TCP ever sent (tcpi_bytes_sent): stands still over redirected sends."""
    return int(struct.unpack_from("Q", sock.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256), 200)[0])


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
def test_both_directions_skip_tcp(rig: Rig, family: int) -> None:
    with rig.pair(family) as pair:
        pair.c.sendall(b"by tcp")
        assert pair.p.recv(100) == b"by tcp"
        rig.joined(pair)
        before = tcp_sent(pair.c), tcp_sent(pair.p)
        for round in range(100):
            pair.c.sendall(b"request %d" % round)
            assert pair.p.recv(100) == b"request %d" % round
            pair.p.sendall(b"answer %d" % round)
            assert pair.c.recv(100) == b"answer %d" % round
        assert (tcp_sent(pair.c), tcp_sent(pair.p)) == before


def test_leave_then_come_back_as_often_as_you_like(rig: Rig) -> None:
    with rig.pair() as pair:
        numbers = set()
        for round in range(50):
            membership = rig.joined(pair)
            numbers.add(membership.pair)
            before = tcp_sent(pair.c)
            pair.c.sendall(b"redirected")
            assert pair.p.recv(100) == b"redirected"
            assert tcp_sent(pair.c) == before
            membership.leave()
            assert not membership.inside
            pair.p.sendall(b"t" * 70_000)
            got = b""
            while len(got) < 70_000:
                got += pair.c.recv(1 << 20)
            pair.c.sendall(b"by tcp %d" % round)
            assert pair.p.recv(100) == b"by tcp %d" % round
            assert tcp_sent(pair.c) > before
        assert len(numbers) == 1


@pytest.mark.parametrize("first", ["c", "p"])
@pytest.mark.parametrize("how", ["closed", "reset", "unread"])
def test_the_binding_ends_with_the_connection(rig: Rig, first: str, how: str) -> None:
    """Whoever ends it, and though nobody leaves: a killed worker cannot."""
    with rig.pair() as pair:
        membership = rig.joined(pair)
        ends = [pair.c, pair.p] if first == "c" else [pair.p, pair.c]
        if how == "unread":
            ends[1].sendall(b"redirected, and never read")
        if how == "reset":
            ends[0].setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        assert rig.binding(membership) is not None
        for end in ends:
            end.close()
        until(lambda: rig.binding(membership) is None, "the binding is gone")
        assert list(rig.commands.socks.keys()) == []


def test_leave_never_throws_unread_bytes_away(rig: Rig) -> None:
    with rig.pair() as pair:
        membership = rig.joined(pair)
        pair.p.sendall(b"answer")
        membership.leave()
        assert membership.inside
        pair.p.sendall(b" and more")  # the binding is off: by TCP, behind the redirected bytes
        assert pair.c.recv(6) == b"answer"
        membership.leave()
        assert not membership.inside
        assert unread(pair.c) == len(b" and more")
        assert pair.c.recv(100) == b" and more"


def test_fits_follows_the_reader(rig: Rig) -> None:
    with rig.pair() as pair:
        membership = rig.joined(pair)
        half = abi.CREDIT_BYTES // 2
        assert membership.fits(half)
        pair.p.sendall(b"a" * half)
        assert membership.fits(half)
        pair.p.sendall(b"b" * half)
        assert not membership.fits(1)
        got = b""
        while len(got) < 2 * half:
            got += pair.c.recv(1 << 20)
        assert got == b"a" * half + b"b" * half
        assert membership.fits(abi.CREDIT_BYTES)


def test_an_edge_triggered_reader_is_woken(rig: Rig) -> None:
    with rig.pair() as pair, select.epoll() as epoll:
        pair.c.setblocking(False)
        epoll.register(pair.c, select.EPOLLIN | select.EPOLLET)
        assert epoll.poll(0) == []
        rig.joined(pair)
        for _ in range(200):
            pair.p.sendall(b"x")
            assert epoll.poll(1) == [(pair.c.fileno(), select.EPOLLIN)]
            assert pair.c.recv(10) == b"x"


def test_sendfile_is_redirected(rig: Rig, tmp_path: os.PathLike[str]) -> None:
    path = os.path.join(tmp_path, "body")
    with open(path, "wb") as file:
        file.write(b"s" * 100_000)
    with rig.pair() as pair, open(path, "rb") as file:
        rig.joined(pair)
        before = tcp_sent(pair.c)
        assert os.sendfile(pair.c.fileno(), file.fileno(), 0, 100_000) == 100_000
        got = b""
        while len(got) < 100_000:
            got += pair.p.recv(1 << 20)
        assert got == b"s" * 100_000
        assert tcp_sent(pair.c) == before


def test_data_then_end_of_stream_in_both_halves(rig: Rig) -> None:
    with rig.pair() as pair:
        rig.joined(pair)
        pair.c.sendall(b"last request")
        pair.c.shutdown(socket.SHUT_WR)
        assert pair.p.recv(100) == b"last request"
        assert pair.p.recv(100) == b""
        pair.p.sendall(b"last answer")
        pair.p.close()
        assert pair.c.recv(100) == b"last answer"
        assert pair.c.recv(100) == b""


def test_drain_empties_the_table_and_lets_nobody_in(rig: Rig) -> None:
    with rig.pair() as pair, rig.pair() as other:
        rig.joined(pair)
        pair.c.sendall(b"unread")
        assert redirect.drain(rig.maps, 0.05) == 1  # P has not read, so its entry stays; C's goes
        assert rig.join(other) is None
        assert rig.redirector.last is Reason.NOT_BOUND
        assert pair.p.recv(100) == b"unread"
        assert redirect.drain(rig.maps, 0.05) == 0
        assert list(rig.commands.socks.keys()) == []
        pair.c.sendall(b"still works")
        assert pair.p.recv(100) == b"still works"
        rig.commands.pairs.delete(redirect.NO_PAIR)
        rig.joined(pair)
