"""psql gets from PostgreSQL through the mesh what it gets without it: startup, big copies, errors, cancelling."""

from __future__ import annotations

import hashlib
import signal
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from tests.support import daemons
from tests.support.machine import Done, Machine, until, which
from tests.support.ways import ADDRESSES, DIRECT, PROXY, Ways

PORT = 5432
ROWS = 60_000  # of a hundred bytes: some MB, far more than a relay or a socket holds
PIPES: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
TABLE = """
create temp table t (id int primary key, what text, at numeric);
\\copy t from {file}
select count(*), sum(id), md5(string_agg(what, ',' order by id)) from t;
select id, what from t where id % 10000 = 7 order by id;
begin; update t set what = 'x' where id < 10; savepoint s; select 1 / 0; rollback to s; commit;
select count(*) from t where what = 'x';
select * from nowhere;
prepare q(int) as select what from t where id = $1; execute q(77); execute q(78);
do $$ begin raise notice 'a notice'; raise warning 'a warning'; end $$;
listen news; notify news, 'hello'; select 'after the notification';
select host(inet_client_addr()), ssl from pg_stat_ssl where pid = pg_backend_pid();
select repeat('long row ', 200000);
"""


@pytest.fixture(scope="module")
def ways(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ways]:
    folder = tmp_path_factory.mktemp("postgres")
    with Machine(folder, f"mt-postgres-{folder.parent.name[-8:]}") as machine:
        with daemons.postgres(machine) as server, Ways(machine, server, port=PORT, protocol="tcp") as made:
            yield made


def psql(host: str, port: int, *more: str, ssl: str = "disable") -> list[str]:
    # What of the environment or of somebody's files would change the session stays out of it.
    bare = ["env", "-i", "PATH=/usr/bin:/bin", "LC_ALL=C", f"PGSSLMODE={ssl}", which("psql"), "-X", "-q"]
    return [*bare, "-h", host, "-p", str(port), "-U", "postgres", "-d", "postgres", *more]


def plain(ways: Ways, *more: str, ssl: str = "disable") -> Done:
    """The same without the mesh."""
    command = psql("127.0.0.1", ways.server, *more, ssl=ssl)
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=30)


@pytest.mark.parametrize("way", [DIRECT, PROXY])
@pytest.mark.parametrize("ssl", ["disable", "prefer"])
def test_a_session(ways: Ways, way: str, ssl: str, tmp_path: Path) -> None:
    rows = tmp_path / "rows"
    rows.write_text("".join(f"{n}\t{hashlib.sha256(b'%d' % n).hexdigest()} and more\t{n / 7}\n" for n in range(ROWS)))
    script = tmp_path / "script.sql"
    script.write_text(TABLE.format(file=rows))
    options = ["-f", str(script)]
    without = plain(ways, *options, ssl=ssl)
    with ways.carrying(way, 1):
        meshed = ways.machine.client(*psql(ADDRESSES[way], PORT, *options, ssl=ssl))
    assert "long row long row" in meshed.stdout and "division by zero" in meshed.stderr
    assert without_pids(meshed) == without_pids(without)


def without_pids(done: Done) -> tuple[int, Sequence[str], str]:
    """What a session said, but for the number of its own server process."""
    said = [line.partition(" received from server process")[0] for line in done.stdout.splitlines()]
    return done.returncode, said, done.stderr


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_copy_out(ways: Ways, way: str, tmp_path: Path) -> None:
    copy = f"copy (select n, md5(n::text) from generate_series(1, {3 * ROWS}) n) to stdout"
    without = plain(ways, "-c", copy)
    with ways.carrying(way, 1):
        meshed = ways.machine.client(*psql(ADDRESSES[way], PORT, "-c", copy))
    assert len(meshed.stdout) > 5_000_000
    assert meshed.stdout == without.stdout


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_a_query_is_cancelled(ways: Ways, way: str) -> None:
    """Ctrl-C: psql opens a second connection to the same address, says whom to stop, and hears nothing but its end."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    sleep = f"select pg_sleep(60), '{way}'"
    with ways.carrying(way, 2):
        client = ways.machine.start_client(*psql(ADDRESSES[way], PORT, "-c", sleep), **pipes)
        running = f"select count(*) from pg_stat_activity where state = 'active' and query = $q${sleep}$q$"
        until(lambda: plain(ways, "-At", "-c", running).stdout == "1\n", "the query runs")
        client.send_signal(signal.SIGINT)
        _out, err = client.communicate(timeout=20)
    assert (client.returncode, err) == (1, "Cancel request sent\nERROR:  canceling statement due to user request\n")


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_many_short_sessions(ways: Ways, way: str) -> None:
    """pgbench, a connection for each of its transactions."""
    pgbench = str(daemons.programs_of_postgres() / "pgbench")
    where = ["-U", "postgres", "-h"]
    made = subprocess.run(
        [pgbench, "-i", "-q", *where, "127.0.0.1", "-p", str(ways.server), "postgres"],
        capture_output=True, text=True, check=False, timeout=30,
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    load = ["-n", "-S", "-C", "-c", "8", "-t", "40"]
    with ways.carrying(way, 321):  # and one to look at the tables
        done = ways.machine.client(pgbench, *load, *where, ADDRESSES[way], "-p", str(PORT), "postgres")
    assert done.returncode == 0, done.stderr
    assert "number of transactions actually processed: 320/320" in done.stdout
    assert "number of failed transactions: 0 " in done.stdout


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_a_session_outlives_its_endpoint(ways: Ways, way: str) -> None:
    """An endpoint that leaves the mesh gets nobody new; whoever talks to it goes on (KERNEL.md B6-20)."""

    def change(servers: Sequence[int]) -> None:
        begin = len(ways.machine.log())
        ways.configure(servers)
        ways.machine.until_logged("mesh applied", begin)

    client = ways.machine.start_client(*psql(ADDRESSES[way], PORT, "-At"), **PIPES)

    def answer(number: int) -> str:
        client.stdin.write(f"select 'answer ' || {number};\n")
        client.stdin.flush()
        return str(client.stdout.readline())

    assert answer(1) == "answer 1\n"
    change([])
    try:
        refused = ways.machine.client(*psql(ADDRESSES[way], PORT, "-c", "select 1"))
        assert refused.returncode == 2, refused.stdout
        assert answer(2) == "answer 2\n"
    finally:
        change([ways.server])
    assert client.communicate(timeout=20)[0] == ""
    assert client.returncode == 0


@pytest.mark.parametrize("way", [DIRECT, PROXY])
def test_a_client_that_is_killed_leaves_no_session(ways: Ways, way: str) -> None:
    """The server learns of it, also through a relay; else sessions pile up until it takes no more."""
    client = ways.machine.start_client(*psql(ADDRESSES[way], PORT), **PIPES)
    client.stdin.write("select pg_backend_pid();\n")
    client.stdin.flush()
    pid = next(line.strip() for line in client.stdout if line.strip().isdigit())
    client.kill()
    with suppress(BrokenPipeError):
        client.stdin.close()
    alive = f"select count(*) from pg_stat_activity where pid = {pid}"
    until(lambda: plain(ways, "-At", "-c", alive).stdout == "0\n", "the session has ended")
