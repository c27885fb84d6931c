"""The access log: golden lines, nothing breaks a line, nothing blocks the loop, rotation loses nothing."""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import re
import socket
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meshbpf.accesslog_format import KEYS, Seconds, json_line, text_line, wanted
from meshbpf.errors import ConfigError
from meshbpf.model import AccessLogPolicy, AccessLogSettings
from meshbpf.record import Record
from userspace_proxy import accesslog as module
from userspace_proxy.accesslog import LIMIT, AccessLog

STRINGS = tuple(
    key
    for key in KEYS
    if key
    not in {
        "start_time", "response_code", "bytes_received", "bytes_sent", "duration_ms", "upstream_service_time_ms",
        "attempts",
    }
)  # fmt: skip


def record(**fields: Any) -> Record:
    made = Record("orders", 1_700_000_000.123, "web.service", "127.0.0.1:40000")
    values: dict[str, Any] = {
        "request_id": "7f3f9c1e", "route_name": "all", "method": "GET", "authority": "orders", "path": "/v1/a?b=c",
        "protocol": "HTTP/1.1", "response_code": 200, "response_code_details": "via_upstream", "bytes_received": 3,
        "bytes_sent": 512, "duration_ms": 3.25, "upstream_service_time_ms": 2.75, "upstream_host": "127.0.0.1:8081",
        "attempts": 1, "user_agent": "curl/8.0",
    } | fields  # fmt: skip
    for name, value in values.items():
        setattr(made, name, value)
    return made


def test_the_json_line_is_the_contract() -> None:
    assert json_line(record(), Seconds()) == (
        '{"start_time":"2023-11-14T22:13:20.123Z","request_id":"7f3f9c1e","trace_id":null,"direction":"outbound",'
        '"workload":"web.service","service":"orders","route_name":"all","method":"GET","authority":"orders",'
        '"path":"/v1/a?b=c","protocol":"HTTP/1.1","response_code":200,"response_flags":null,'
        '"response_code_details":"via_upstream","bytes_received":3,"bytes_sent":512,"duration_ms":3.250,'
        '"upstream_service_time_ms":2.750,"upstream_host":"127.0.0.1:8081","downstream_remote":"127.0.0.1:40000",'
        '"attempts":1,"carrier":"proxy","reason":null,"user_agent":"curl/8.0","x_forwarded_for":null,'
        '"requested_server_name":null}\n'
    )


def test_the_text_line_is_envoys() -> None:
    assert text_line(record(), Seconds()) == (
        '[2023-11-14T22:13:20.123Z] "GET /v1/a?b=c HTTP/1.1" 200 - 3 512 3 2 "-" "curl/8.0" "7f3f9c1e" "orders" '
        '"127.0.0.1:8081"\n'
    )


def test_what_is_missing_is_null_or_a_dash() -> None:
    bare = Record("orders", 0.9996, "web.service", "[::1]:40000")
    fields = json.loads(json_line(bare, Seconds()))
    assert [key for key, value in fields.items() if value is None] == [
        "request_id", "trace_id", "route_name", "method", "authority", "path", "protocol", "response_flags",
        "response_code_details", "upstream_service_time_ms", "upstream_host", "reason", "user_agent", "x_forwarded_for",
        "requested_server_name",
    ]  # fmt: skip
    line = text_line(bare, Seconds())
    assert line == '[1970-01-01T00:00:01.000Z] "- - -" 0 - 0 0 0 - "-" "-" "-" "-" "-"\n'  # 0.9996 s rounds up


hostile = st.one_of(
    st.none(),
    st.text(alphabet=st.characters(codec=None)),
    st.binary().map(lambda raw: raw.decode("latin-1")),
    st.binary().map(lambda raw: raw.decode("utf-8", "surrogateescape")),
    st.sampled_from(['"', "\\", "\r\n", "\x00", "\x7f", "\x85", "\u2028", "\udcff", "None", '","a":"', "a b"]),
)
records = st.fixed_dictionaries({key: hostile for key in STRINGS})


def filled(fields: dict[str, str | None]) -> Record:
    made = record()
    never_none = ("direction", "workload", "service", "downstream_remote", "carrier")
    for key, value in fields.items():
        setattr(made, key, "" if value is None and key in never_none else value)
    return made


@given(records)
def test_no_bytes_in_any_field_break_a_json_line(fields: dict[str, str | None]) -> None:
    made = filled(fields)
    line = json_line(made, Seconds())
    assert line.encode("utf-8").decode("utf-8").splitlines(keepends=True) == [line]
    parsed = json.loads(line)
    assert tuple(parsed) == KEYS
    for key in STRINGS:
        value = getattr(made, key)
        expected = None if value is None else value.encode("utf-8", "backslashreplace").decode("utf-8")
        assert parsed[key] == expected


QUOTED = r'"((?:[^"\\]|\\.)*)"'
TEXT = re.compile(rf'\[\S+\] "(\S+) (\S+) (\S+)" 200 (\S+) 3 512 3 2 {" ".join([QUOTED] * 5)}\n')


@given(records)
def test_no_bytes_in_any_field_break_a_text_line(fields: dict[str, str | None]) -> None:
    line = text_line(filled(fields), Seconds())
    assert line.encode("utf-8").decode("utf-8").splitlines(keepends=True) == [line]
    assert line[:-1].isprintable()
    assert TEXT.fullmatch(line)


@pytest.mark.parametrize(
    ("fields", "rnd", "expected"),
    [
        ({}, 0.05, True),
        ({}, 0.1, False),
        ({"response_code": 404}, 0.99, False),
        ({"response_code": 500}, 0.99, True),
        ({"response_flags": "UF"}, 0.99, True),
        ({"duration_ms": 999.0}, 0.99, False),
        ({"duration_ms": 1000.0}, 0.99, True),
        ({"duration_ms": 9e9, "protocol": "TCP", "response_code": 0}, 0.99, False),
    ],
)
def test_errors_and_slow_requests_are_always_logged(fields: dict[str, Any], rnd: float, expected: bool) -> None:
    assert wanted(record(**fields), AccessLogPolicy(sample_percent=10.0), rnd) is expected


def test_a_hundred_percent_is_everything_and_zero_nothing() -> None:
    assert wanted(record(), AccessLogPolicy(), 0.999999)
    assert not wanted(record(), AccessLogPolicy(sample_percent=0.0), 0.0)


class Losses:
    def __init__(self) -> None:
        self.lines = 0

    def __call__(self, source: str, count: int) -> None:
        assert source == "accesslog"
        self.lines += count


@pytest.fixture
def losses() -> Losses:
    return Losses()


def opened(path: Path | str, losses: Losses) -> AccessLog:
    return AccessLog(AccessLogSettings(path=str(path)), asyncio.get_running_loop(), losses)


def numbers(raw: bytes) -> list[int]:
    return [json.loads(line)["bytes_sent"] for line in raw.splitlines()]


async def test_a_line_is_written_soon_and_lines_together(tmp_path: Path, losses: Losses) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    log = opened(fifo, losses)
    readable = asyncio.Event()
    asyncio.get_running_loop().add_reader(reader, readable.set)
    for number in range(3):
        log.write(record(bytes_sent=number))
    with pytest.raises(BlockingIOError):
        os.read(reader, 1)
    await asyncio.wait_for(readable.wait(), 5)
    assert numbers(os.read(reader, 65536)) == [0, 1, 2]
    asyncio.get_running_loop().remove_reader(reader)
    log.close()
    os.close(reader)


async def test_64_kib_are_written_without_waiting(tmp_path: Path, losses: Losses) -> None:
    log = opened(tmp_path / "log", losses)
    for number in range(200):
        log.write(record(bytes_sent=number))
    assert (tmp_path / "log").stat().st_size >= module.CHUNK
    log.close()
    assert numbers((tmp_path / "log").read_bytes()) == list(range(200))


async def test_a_renamed_file_is_followed(tmp_path: Path, losses: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAT_EVERY", 0.0)
    log = opened(tmp_path / "log", losses)
    log.write(record(bytes_sent=1))
    assert log.flush()
    (tmp_path / "log").rename(tmp_path / "log.1")
    log.write(record(bytes_sent=2))
    assert log.flush()
    (tmp_path / "log").unlink()
    log.write(record(bytes_sent=3))
    log.write(record(bytes_sent=4))
    log.close()
    # What was logged before the move was noticed goes to the old file, so nothing is lost and order holds.
    assert numbers((tmp_path / "log.1").read_bytes()) == [1, 2]
    assert numbers((tmp_path / "log").read_bytes()) == []
    assert losses.lines == 0


async def test_the_file_is_looked_at_once_a_second(tmp_path: Path, losses: Losses) -> None:
    log = opened(tmp_path / "log", losses)
    (tmp_path / "log").rename(tmp_path / "log.1")
    log.write(record(bytes_sent=1))
    log.flush()
    assert not (tmp_path / "log").exists()
    log.reopen()
    log.write(record(bytes_sent=2))
    log.close()
    assert numbers((tmp_path / "log").read_bytes()) == [2]


@pytest.fixture
async def pipe(tmp_path: Path) -> AsyncIterator[tuple[Path, int]]:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    yield fifo, reader
    os.close(reader)


async def test_a_full_pipe_loses_counted_lines_and_never_blocks(
    pipe: tuple[Path, int], losses: Losses, caplog: pytest.LogCaptureFixture
) -> None:
    path, reader = pipe
    log = opened(path, losses)
    capacity = fcntl.fcntl(reader, fcntl.F_GETPIPE_SZ)
    size = len(json_line(record(bytes_sent=1000), Seconds()))
    total = (capacity + 2 * LIMIT) // size
    with caplog.at_level(logging.WARNING, "accesslog"):
        for number in range(1000, 1000 + total):
            log.write(record(bytes_sent=number))
    assert losses.lines > LIMIT // size // 2
    assert len(caplog.records) == 1
    got = b""
    for _ in range(10_000):
        try:
            got += os.read(reader, 65536)
        except BlockingIOError:
            if log.flush():
                break
    with contextlib.suppress(BlockingIOError):
        got += os.read(reader, 1 << 20)
    kept = numbers(got)  # every line is whole
    assert kept == sorted(kept)
    assert len(kept) + losses.lines == total
    log.close()


async def test_two_workers_on_one_pipe_do_not_mix_their_lines(pipe: tuple[Path, int], losses: Losses) -> None:
    path, reader = pipe
    logs = [opened(path, losses), opened(path, losses)]
    got = b""
    for number in range(2000):
        logs[number % 2].write(record(bytes_sent=number))
        if number % 50 == 0:
            for log in logs:
                log.flush()
            try:
                got += os.read(reader, 7777)
            except BlockingIOError:
                continue
    while not all([log.flush() for log in logs]):
        got += os.read(reader, 7777)
    for log in logs:
        log.close()
    while more := os.read(reader, 65536):
        got += more
    assert sorted(numbers(got)) == list(range(2000))


async def test_a_gone_reader_costs_lines_not_the_proxy(tmp_path: Path, losses: Losses) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    log = opened(fifo, losses)
    os.close(reader)
    log.write(record())
    assert not log.flush()
    log.close()
    assert losses.lines == 1


async def test_a_fifo_may_get_its_reader_later(tmp_path: Path, losses: Losses, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "STAT_EVERY", 0.0)
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    log = opened(fifo, losses)
    log.write(record(bytes_sent=9))
    assert not log.flush()
    reader = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK)
    assert log.flush()
    assert numbers(os.read(reader, 65536)) == [9]
    log.close()
    os.close(reader)


async def test_a_path_that_cannot_be_opened_is_a_bad_configuration(tmp_path: Path, losses: Losses) -> None:
    with pytest.raises(ConfigError, match=r"Agent\.spec\.accessLog\.path"):
        opened(tmp_path / "no" / "log", losses)


async def test_a_full_disk_keeps_the_lines_that_fit_the_buffer(losses: Losses) -> None:
    log = opened("/dev/full", losses)
    log.write(record())
    assert not log.flush()
    assert losses.lines == 0
    log.close()
    assert losses.lines == 1


async def test_a_socket_as_stdout_is_written_without_making_it_nonblocking_for_others(losses: Losses) -> None:
    ours, theirs = socket.socketpair()
    saved = os.dup(1)
    os.dup2(ours.fileno(), 1)
    try:
        log = opened("/dev/stdout", losses)
        for number in range(5000):
            log.write(record(bytes_sent=number))
        assert os.get_blocking(1)
    finally:
        os.dup2(saved, 1)
        os.close(saved)
    ours.close()
    assert losses.lines > 0  # nobody read: it was full, and nothing waited
    theirs.setblocking(False)
    got = b""
    while not log.flush():
        got += theirs.recv(1 << 20)
    log.close()
    while more := theirs.recv(1 << 20):
        got += more
    theirs.close()
    assert len(numbers(got)) + losses.lines == 5000


async def test_a_file_as_stdout_is_shared_with_whoever_writes_there(tmp_path: Path) -> None:
    """`meshbpf run > FILE 2>&1`: neither log may write over the other."""
    script = """
import asyncio, os, sys
from meshbpf.model import AccessLogSettings
from meshbpf.record import Record
from userspace_proxy.accesslog import AccessLog

async def main():
    log = AccessLog(AccessLogSettings(), asyncio.get_running_loop(), lambda source, count: None)
    os.write(2, b"first word of the agent\\n")
    log.write(Record("orders", 1.0, "w", "r"))
    log.flush()
    os.write(2, b"last word of the agent\\n")

asyncio.run(main())
"""
    path = tmp_path / "both.log"
    with path.open("wb") as both:
        child = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=both, stderr=both)
        assert await child.wait() == 0
    first, line, last = path.read_text().splitlines()
    assert (first, last) == ("first word of the agent", "last word of the agent")
    assert json.loads(line)["service"] == "orders"


def test_long_values_are_not_remembered() -> None:
    """A hostile caller chooses its user agent: what is remembered stays within some mebibytes."""
    from meshbpf import accesslog_format

    accesslog_format._COMMON.clear()
    for count in range(100):
        made = record(user_agent=f"{count}" + "\x80" * 60_000)
        assert json.loads(json_line(made, Seconds()))["user_agent"] == made.user_agent
    assert not accesslog_format._COMMON
    json_line(record(), Seconds())
    assert len(accesslog_format._COMMON) == 1


def test_a_path_is_checked_before_anybody_writes(tmp_path: Path) -> None:
    module.check(AccessLogSettings(path=str(tmp_path / "new.log")))
    module.check(AccessLogSettings())
    with pytest.raises(ConfigError, match="No such file"):
        module.check(AccessLogSettings(path=str(tmp_path / "missing" / "new.log")))
