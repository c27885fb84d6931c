"""Who must not join, who must stop, and what must survive: the traps that sockmaps are known for, one test each."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import struct
import subprocess
import threading
import time
from collections.abc import Iterator
from dataclasses import replace

import pytest

from loader import abi, dataplane, libbpf, redirect, trials
from loader.pipes import Pipes, holds_payload_pipe
from loader.rig import ADDRESS4, PORT, Pair, Rig
from meshbpf.errors import Busy
from meshbpf.reason import Reason
from tests.kernel.test_redirect import tcp_sent
from tests.support import netns
from tests.support.machine import until

IPPROTO_MPTCP, SO_ZEROCOPY, MSG_ZEROCOPY, SO_RCVLOWAT = 262, 60, 0x4000000, 18
COMMAND = abi.Program.COMMAND


def refused(rig: Rig, pair: Pair, reason: Reason) -> None:
    """Not joined, for that reason, counted; and the connection works as if nothing had been asked."""
    before = rig.count(reason, COMMAND)
    assert rig.join(pair) is None
    assert rig.redirector.last is reason
    assert rig.count(reason, COMMAND) == before + 1
    unread = pair.c.recv(1 << 16) if select.select([pair.c], [], [], 0)[0] else b""
    assert unread in (b"", b"unread")


def talk(pair: Pair) -> None:
    pair.c.sendall(b"request")
    assert pair.p.recv(1 << 16) == b"request"
    pair.p.sendall(b"answer")
    assert pair.c.recv(1 << 16) == b"answer"


# --- who must not join --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["c", "p"])
def test_not_with_bytes_unread(rig: Rig, end: str) -> None:
    with rig.pair() as pair:
        getattr(pair, end).sendall(b"unread")
        select.select([pair.p if end == "c" else pair.c], [], [], 1)
        refused(rig, pair, Reason.UNREAD)


def test_not_a_bystander(rig: Rig) -> None:
    """Whoever dials the proxy's port directly was led by nobody."""
    client = socket.socket()
    listener = rig.listeners[socket.AF_INET]
    client.connect(listener.getsockname())
    server, _ = listener.accept()
    with Pair(client, server, dataplane.netns_cookie(server)) as pair:
        client.setblocking(False)
        refused(rig, pair, Reason.SOCKET_UNKNOWN)


def test_not_in_another_namespace_than_the_named(rig: Rig) -> None:
    with rig.pair() as pair:
        refused(rig, Pair(pair.c, pair.p, pair.netns + 1), Reason.SOCKET_UNKNOWN)


def test_not_when_nobody_is_there(rig: Rig) -> None:
    with rig.pair() as pair:
        assert rig.redirector.join(pair.netns, "127.0.0.1", 1, "127.0.0.1", rig.port) is None
        assert rig.redirector.last is Reason.SOCKET_UNKNOWN


def test_not_a_blocking_reader(rig: Rig) -> None:
    with rig.pair(blocking=True) as pair:
        refused(rig, pair, Reason.READER_BLOCKS)
        talk(pair)


def test_not_a_reader_with_a_low_water_mark(rig: Rig) -> None:
    with rig.pair() as pair:
        pair.c.setsockopt(socket.SOL_SOCKET, SO_RCVLOWAT, 100)
        refused(rig, pair, Reason.READER_LOWAT)


def test_not_a_zero_copy_sender(rig: Rig) -> None:
    with rig.pair() as pair:
        pair.c.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        refused(rig, pair, Reason.SENDER_ZEROCOPY)


def test_not_a_closing_connection(rig: Rig) -> None:
    with rig.pair() as pair:
        pair.c.shutdown(socket.SHUT_WR)
        assert pair.p.recv(1) == b""
        refused(rig, pair, Reason.NOT_ESTABLISHED)


def test_not_mptcp(rig: Rig) -> None:
    """Its subflows in a sockmap crashed kernels. It talks on, led to the proxy or left alone."""
    client = socket.socket(socket.AF_INET, socket.SOCK_STREAM, IPPROTO_MPTCP)
    client.settimeout(1)
    rig.plane.beat(time.monotonic_ns())
    try:
        client.connect((ADDRESS4, PORT))
    except OSError:
        client.close()
        return  # the hook sees protocol MPTCP and keeps out: nobody was led
    with client:
        server, _ = rig.listeners[socket.AF_INET].accept()
        with Pair(client, server, dataplane.netns_cookie(server)) as pair:
            server.settimeout(1)
            assert rig.join(pair) is None
            assert rig.redirector.last in (Reason.NOT_TCP, Reason.SOCKET_UNKNOWN)
            talk(pair)


def test_not_a_process_that_holds_pipes(rig: Rig) -> None:
    assert not holds_payload_pipe(os.getpid())
    with rig.pair() as pair:
        client, local = pair.p.getpeername(), pair.p.getsockname()

        def join(pipes: Pipes) -> redirect.Membership | None:
            judge = redirect.Redirector(rig.maps, contextlib.nullcontext, pair.netns, pipes)
            try:
                return judge.join(pair.netns, client[0], client[1], local[0], local[1])
            finally:
                judge.close()

        before = rig.count(Reason.READER_MAY_SPLICE, COMMAND)
        reading, writing = os.pipe()
        try:
            assert join(Pipes()) is None
            assert rig.count(Reason.READER_MAY_SPLICE, COMMAND) == before + 1
            with select.epoll() as epoll:
                epoll.register(reading, select.EPOLLIN)
                assert not holds_payload_pipe(os.getpid())  # an event loop's wake-up
        finally:
            os.close(reading)
            os.close(writing)
        assert join(Pipes()) is not None


def test_a_process_that_cannot_be_seen_may_splice() -> None:
    assert Pipes().may_splice(2**22 + 1)


# --- who must stop ------------------------------------------------------------------------------------------------


def test_an_application_that_turns_blocking_is_let_go(rig: Rig) -> None:
    with rig.pair() as pair:
        membership = rig.joined(pair)
        talk(pair)
        pair.c.setblocking(True)
        before, sent = rig.count(Reason.READER_BLOCKS), tcp_sent(pair.c)
        talk(pair)
        assert rig.count(Reason.READER_BLOCKS) == before + 1
        assert tcp_sent(pair.c) == sent + len(b"request")
        assert not membership.fits(redirect.GRANT_BYTES + 1)
        membership.leave()
        assert not membership.inside
        talk(pair)


def test_a_zero_copy_sender_gets_its_completions(rig: Rig) -> None:
    with rig.pair() as pair:
        rig.joined(pair)
        talk(pair)
        pair.c.setsockopt(socket.SOL_SOCKET, SO_ZEROCOPY, 1)
        pair.c.send(b"z" * 50_000, MSG_ZEROCOPY)
        assert len(trials.receive(pair.p, 50_000)) == 50_000
        poller = select.poll()
        poller.register(pair.c, 0)
        assert poller.poll(1000)[0][1] & select.POLLERR
        assert pair.c.recvmsg(1, 100, socket.MSG_ERRQUEUE)[1]


def test_a_reader_that_does_not_read_costs_its_credit(rig: Rig) -> None:
    """In both directions; then TCP's own limits hold, and once all is read the redirect comes back by itself."""
    with rig.pair() as pair:
        membership = rig.joined(pair)
        for name, side, sender, reader in (
            ("requests", abi.Side.APPLICATION, pair.c, pair.p),
            ("answers", abi.Side.PROXY, pair.p, pair.c),
        ):
            before = rig.count(Reason.NO_CREDIT)
            taken = trials.flood(sender)
            sender.settimeout(2)
            assert taken < trials.FLOOD, name
            assert rig.count(Reason.NO_CREDIT) > before
            binding = rig.binding(membership)
            assert binding is not None and binding.sent[side] - binding.read[side] <= abi.CREDIT_BYTES
            assert trials.receive(reader, taken) == bytes(taken)
            reader.sendall(b"I have read it")
            assert sender.recv(100) == b"I have read it"
        talk(pair)  # the kernel itself passes the send after one that got EAGAIN, on either side
        talk(pair)
        sent = tcp_sent(pair.c), tcp_sent(pair.p)
        talk(pair)
        assert (tcp_sent(pair.c), tcp_sent(pair.p)) == sent


def test_a_missing_target_is_tcp(rig: Rig) -> None:
    with rig.pair() as pair:
        membership = rig.joined(pair)
        before = rig.count(Reason.TARGET_MISSING)
        rig.delete(membership.pair, abi.Side.PROXY)
        talk(pair)
        assert rig.count(Reason.TARGET_MISSING) == before + 1


# --- what must survive --------------------------------------------------------------------------------------------


def test_a_stopped_reader_reads_on(rig: Rig) -> None:
    """SIGSTOP and SIGCONT around a redirect: an epoll reader notices nothing (a blocking one would get EAGAIN)."""
    with rig.pair() as pair:
        rig.joined(pair)
        pid = os.fork()
        if pid == 0:
            with contextlib.suppress(OSError):
                with select.epoll() as epoll:
                    epoll.register(pair.c, select.EPOLLIN)
                    epoll.poll(5)
                    pair.c.send(pair.c.recv(100))
            os._exit(0)
        try:
            os.kill(pid, signal.SIGSTOP)
            os.waitpid(pid, os.WUNTRACED)
            pair.p.sendall(b"while it was stopped")
            os.kill(pid, signal.SIGCONT)
            assert pair.p.recv(100) == b"while it was stopped"
        finally:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


def test_deferred_accept_keeps_the_order(rig: Rig) -> None:
    """TCP_DEFER_ACCEPT establishes the accepted socket late, which inverted every connection that joined early."""
    listener = rig.listeners[socket.AF_INET]
    listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1)
    try:
        for _ in range(50):
            rig.plane.beat(time.monotonic_ns())
            client = socket.create_connection((ADDRESS4, PORT), 2)
            client.sendall(b"first ")
            server, _ = listener.accept()
            server.settimeout(2)
            with Pair(client, server, dataplane.netns_cookie(server)) as pair:
                assert rig.join(pair) is None  # unread
                client.sendall(b"second ")
                got = trials.receive(server, 13)
                rig.joined(pair)
                client.sendall(b"third")
                assert got + server.recv(100) == b"first second third"
    finally:
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 0)


def test_another_owner_of_the_socket(rig: Rig) -> None:
    """A second sk_msg user: whoever came first has it, and the other one does without."""
    other = Rig(f"{rig.instance.name[:20]}-other")
    try:
        other.start()
        maps = next(other.instance.pins.glob("maps-*"))
        with libbpf.Map(maps / "socks", 16, 8) as theirs, rig.pair() as pair, rig.pair() as mine:
            theirs.update(bytes(abi.MemberKey(1, 0)), struct.pack("q", pair.c.fileno()))
            refused(rig, pair, Reason.SOCKET_TAKEN)
            talk(pair)
            rig.joined(mine)
            with pytest.raises(Exception, match="EBUSY"):
                theirs.update(bytes(abi.MemberKey(2, 0)), struct.pack("q", mine.c.fileno()))
            talk(mine)
    finally:
        other.close()


def test_a_full_table_is_tcp(rig: Rig) -> None:
    with contextlib.ExitStack() as stack:
        room = rig.mesh.agent.maps.members // 2 - len(list(rig.commands.socks.keys())) // 2
        pairs = [stack.enter_context(rig.pair()) for _ in range(room + 1)]
        for pair in pairs[:-1]:
            rig.joined(pair)
        refused(rig, pairs[-1], Reason.MEMBERS_FULL)
        for pair in pairs:
            talk(pair)
        pairs[0].c.close()
        pairs[0].p.close()
        rig.joined(pairs[-1])
        talk(pairs[-1])


def test_closed_sockets_leave_the_table(rig: Rig) -> None:
    before = len(list(rig.commands.socks.keys()))
    with rig.pair() as pair:
        rig.joined(pair)
        assert len(list(rig.commands.socks.keys())) == before + 2
    assert len(list(rig.commands.socks.keys())) == before


# --- namespaces ---------------------------------------------------------------------------------------------------


def steer_packets() -> None:
    """RPS on the loopback of the namespace we are in: /sys shows the one in which it was mounted, so mount it anew."""
    script = "mount -t sysfs none /sys && echo 3 > /sys/class/net/lo/queues/rx-0/rps_cpus"
    subprocess.run(["unshare", "--mount", "sh", "-ec", script], check=True)


def test_the_same_tuple_in_two_namespaces(rig: Rig) -> None:
    """Both connections have every address and port in common; each reads only its own bytes. With RPS on, because a
    handshake that is finished by another processor is what early insertion raced with.
    """

    def client(port: int) -> socket.socket:
        made = socket.socket()
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        made.bind(("127.0.0.1", port))
        return made

    with open("/proc/thread-self/ns/net", "rb") as home, rig.pair(client=client(0)) as here, netns.fresh():
        steer_packets()
        with rig.listen(socket.AF_INET, "127.0.0.1", rig.port) as listener:
            port = here.c.getsockname()[1]
            with rig.pair(client=client(port), listener=listener) as there:
                assert here.c.getsockname() == there.c.getsockname()
                assert here.p.getsockname() == there.p.getsockname()
                assert here.netns != there.netns
                judge = redirect.Redirector(rig.maps, lambda _cookie: netns.inside(home.fileno()), there.netns)
                try:
                    client_address, local = here.p.getpeername(), here.p.getsockname()
                    mine = judge.join(here.netns, *client_address, *local)
                    judge_said = judge.last
                    yours = judge.join(there.netns, *client_address, *local)
                    assert mine is not None and yours is not None, (judge_said, judge.last)
                    assert mine.pair != yours.pair
                    sent = tcp_sent(here.c), tcp_sent(there.c)
                    for _ in range(50):
                        here.c.sendall(b"here")
                        there.c.sendall(b"there")
                        assert here.p.recv(100) == b"here"
                        assert there.p.recv(100) == b"there"
                    assert (tcp_sent(here.c), tcp_sent(there.c)) == sent
                    mine.leave()
                    talk(there)
                finally:
                    judge.close()


# --- upgrade and detach -------------------------------------------------------------------------------------------


@pytest.fixture
def own() -> Iterator[Rig]:
    """A rig that a test may attach anew and detach."""
    made = Rig(f"rig-{os.getpid()}-own")
    try:
        made.start()
        made.enter()
        made.serve()
        yield made
    finally:
        try:
            made.finish()
        finally:
            made.close()


def test_members_follow_an_upgrade(own: Rig) -> None:
    """The same layout: unread bytes stay, and the next send runs the new program."""
    with own.pair() as pair:
        own.joined(pair)
        pair.c.sendall(b"unread")
        own.start()
        assert pair.p.recv(100) == b"unread"
        with libbpf.Map(own.maps / "stages", 4, 4) as stages:
            stages.delete(bytes(4))
            before = own.count(Reason.NO_STAGE)
            talk(pair)  # nothing in the stage: TCP, and counted by the stub that the socket joined with
            assert own.count(Reason.NO_STAGE) == before + 2
        own.start()
        own.joined(pair)
        sent = tcp_sent(pair.c)
        talk(pair)
        assert tcp_sent(pair.c) == sent


@pytest.mark.parametrize("how", ["another layout", "detach"])
def test_no_byte_is_lost_when_the_table_goes(own: Rig, how: str) -> None:
    body = bytes(range(256)) * 2000
    with own.pair() as pair:
        own.joined(pair)
        pair.p.sendall(body)
        pair.c.sendall(b"request")
        if how == "detach":
            work = threading.Thread(target=dataplane.detach, args=(own.instance,))
        else:
            sizes = replace(own.mesh.agent.maps, members=512)
            own.mesh = replace(own.mesh, agent=replace(own.mesh.agent, maps=sizes))
            work = threading.Thread(target=own.start)
        work.start()
        until(lambda: own.commands.pairs.lookup(redirect.NO_PAIR), "the table is being emptied")
        assert trials.receive(pair.c, len(body)) == body
        assert pair.p.recv(100) == b"request"
        work.join(5)
        assert not own.maps.exists()
        assert list(own.commands.socks.keys()) == []
        talk(pair)


@pytest.mark.parametrize("how", ["another layout", "detach"])
def test_bytes_that_are_read_late_are_there(own: Rig, how: str, caplog: pytest.LogCaptureFixture) -> None:
    """Longer than a drain waits: the tables that hold them stay, and go with the next attach or detach."""
    body = bytes(range(250)) * 800
    pair = own.pair()
    own.joined(pair)
    sent = tcp_sent(pair.p)
    pair.p.sendall(body)
    assert tcp_sent(pair.p) == sent, "redirected, or this test shows nothing"
    pair.p.close()
    old = own.maps
    if how == "detach":
        with pytest.raises(Busy, match=r"1 connections still hold unread bytes: run detach again"):
            dataplane.detach(own.instance)
        assert not own.instance.links.exists()
    else:
        sizes = replace(own.mesh.agent.maps, members=512)
        own.mesh = replace(own.mesh, agent=replace(own.mesh.agent, maps=sizes))
        own.start()
        assert "1 connections hold unread bytes" in caplog.text
    assert old.exists()
    with pair.c:
        assert trials.receive(pair.c, len(body)) == body
        assert pair.c.recv(1) == b""
        if how == "detach":
            assert dataplane.detach(own.instance)
            assert not own.instance.pins.exists()
        else:
            own.start()
    assert not old.exists()


def test_an_attach_takes_up_what_a_detach_had_to_leave(own: Rig) -> None:
    pair = own.pair()
    own.joined(pair)
    pair.p.sendall(b"unread")
    with pytest.raises(Busy):
        dataplane.detach(own.instance)
    own.start()
    with pair:
        assert pair.c.recv(100) == b"unread"
        talk(pair)
