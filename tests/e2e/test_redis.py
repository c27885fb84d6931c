"""redis-cli gets from Redis through the mesh what it gets without it: pipelines, big values, pub/sub, blocking pops."""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Iterator
from typing import Any

import pytest

from tests.support import daemons
from tests.support.machine import Done, Machine, until, which
from tests.support.ways import ADDRESSES, DIRECT, PROXY, Ways

PORT = 6379
BIG = 24 << 20
PIPES: dict[str, Any] = {
    "stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True
}  # fmt: skip
COMMANDS = r"""
flushall
set text "words \r\n and \x00 bytes"
get text
append text " more"
strlen text
incr count
incrby count 41
rpush list a b c d
lrange list 0 -1
zadd board 2 two 1 one 3 three
zrange board 0 -1 withscores
hset user name x age 7
hgetall user
multi
incr count
get nothing
exec
eval "return {1, 'two', {3}}" 0
lpop text
nonsense 1 2
setrange zeros 3000000 x
getrange zeros 2999990 3000000
get zeros
"""


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp("redis")
    with Machine(folder, f"mt-redis-{folder.parent.name[-8:]}") as machine:
        with daemons.redis(machine) as server, Ways(machine, server, port=PORT, protocol="tcp") as made:
            yield made


def cli(way: str, *more: str) -> list[str]:
    """redis-cli on a way through the mesh."""
    return [which("redis-cli"), "-h", ADDRESSES[way], "-p", str(PORT), *more]


def plain(ways: Ways, *more: str) -> list[str]:
    """The same without the mesh."""
    return [which("redis-cli"), "-p", str(ways.server), *more]


def said(process: subprocess.Popen[str], given: str = "") -> Done:
    """What came of a redis-cli that was started with pipes."""
    out, err = process.communicate(given, timeout=30)
    return Done(process.args, process.returncode, out, err)


def both(ways: Ways, way: str, given: str, *more: str) -> tuple[Done, Done]:
    """The answers without the mesh and on the way, to the same input."""
    without = said(ways.machine.start(plain(ways, *more), **PIPES), given)
    with ways.carrying(way, 1):
        meshed = said(ways.machine.start_client(*cli(way, *more), **PIPES), given)
    return without, meshed


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_commands(ways: Ways, way: str) -> None:
    without, meshed = both(ways, way, COMMANDS)
    assert (meshed.returncode, meshed.stderr) == (without.returncode, without.stderr)
    assert meshed.stdout == without.stdout
    assert "unknown command" in meshed.stdout and len(meshed.stdout) > 3_000_000


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_a_pipeline(ways: Ways, way: str) -> None:
    """redis-cli --pipe sends everything before it reads the last answer: both directions are full at once."""
    commands = "".join(f"set key:{n} {'v' * 200}\nget key:{n // 2}\n" for n in range(40_000))
    without, meshed = both(ways, way, "flushall\n" + commands, "--pipe")
    assert meshed.stdout == without.stdout
    assert "errors: 0, replies: 80001" in meshed.stdout


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_a_big_value(ways: Ways, way: str) -> None:
    value = "".join(hashlib.sha256(b"%d" % n).hexdigest() for n in range(BIG // 64))
    with ways.carrying(way, 2):
        stored = said(ways.machine.start_client(*cli(way, "-x", "set", "big"), **PIPES), value)
        assert stored.stdout == "OK\n"
        read = said(ways.machine.start_client(*cli(way, "get", "big"), **PIPES))
    assert read.stdout == value + "\n"


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_pub_sub(ways: Ways, way: str) -> None:
    """A subscriber hears, in order, what others publish: it asked once, and only the server speaks from then on."""
    with ways.carrying(way, 2):
        hearing = ways.machine.start_client(*cli(way, "subscribe", "news"), **PIPES)
        assert [hearing.stdout.readline() for _ in range(3)] == ["subscribe\n", "news\n", "1\n"]
        news = "".join(f"publish news message-{n}\n" for n in range(500))
        told = said(ways.machine.start_client(*cli(way), **PIPES), news)
        assert told.stdout == "1\n" * 500
        heard = [hearing.stdout.readline() for _ in range(1500)]
    assert heard == [line for n in range(500) for line in ("message\n", "news\n", f"message-{n}\n")]
    hearing.kill()


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_a_blocking_pop(ways: Ways, way: str) -> None:
    """The answer comes when somebody else pushes."""
    waiting = ways.machine.start_client(*cli(way, "blpop", "queue", "20"), **PIPES)
    blocked = plain(ways, "info", "clients")
    until(lambda: "blocked_clients:1" in said(ways.machine.start(blocked, **PIPES)).stdout, "somebody waits")
    assert said(ways.machine.start_client(*cli(way, "rpush", "queue", "x"), **PIPES)).stdout == "1\n"
    assert said(waiting).stdout == "queue\nx\n"


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_many_at_once(ways: Ways, way: str) -> None:
    """redis-benchmark, sixteen requests in flight on each of forty connections."""
    load = ["-c", "40", "-n", "20000", "-P", "16", "-d", "512", "-t", "set,get,lpush,lrange_100", "--csv"]
    done = ways.machine.client(which("redis-benchmark"), "-h", ADDRESSES[way], "-p", str(PORT), *load)
    assert done.returncode == 0 and "error" not in (done.stdout + done.stderr).lower(), done.stderr
    assert done.stdout.count("\n") == 6, done.stdout
