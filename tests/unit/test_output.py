"""Tables, JSON and YAML as people and scripts see them, on whatever screen there is."""

from __future__ import annotations

import fcntl
import json
import os
import pty
import struct
import subprocess
import sys
import termios

import pytest
import typer
import yaml

from meshbpf.cli import layout, output
from meshbpf.cli.layout import Column, Screen

COLUMNS = (Column("service", "SERVICE"), Column("open", "OPEN"), Column("source", "SOURCE", wide=True))
ROWS = [
    {"service": "orders", "open": 0, "source": "mesh.yaml:3:1"},
    {"service": "a-long-name.shop", "open": None, "source": ""},
]


def test_a_table_of_its_own_kind() -> None:
    assert output.table(["A", "LONG"], [["xyz", 1], ["", None]]) == "A    LONG\nxyz     1\n-       -"


def test_wide_shows_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    output.show("table", COLUMNS, ROWS, "services")
    assert capsys.readouterr().out == "SERVICE           OPEN\norders               0\na-long-name.shop     -\n"
    output.show("wide", COLUMNS, ROWS, "services")
    assert capsys.readouterr().out.splitlines()[0] == "SERVICE           OPEN  SOURCE"


@pytest.mark.parametrize(
    ("environment", "terminal", "screen"),
    [
        ({}, False, Screen(None, False)),
        ({"COLUMNS": "100"}, False, Screen(100, False)),
        ({"COLUMNS": "100"}, True, Screen(100, True)),
        ({"COLUMNS": "100", "NO_COLOR": "1"}, True, Screen(100, False)),
        ({"COLUMNS": "100", "NO_COLOR": ""}, True, Screen(100, True)),
        ({"COLUMNS": "100", "TERM": "dumb"}, True, Screen(100, False)),
        ({"COLUMNS": "0"}, False, Screen(None, False)),
        ({"COLUMNS": "wide"}, False, Screen(None, False)),
    ],
)
def test_who_looks(environment: dict[str, str], terminal: bool, screen: Screen) -> None:
    assert output.screen(environment, terminal) == screen


def test_a_real_terminal_has_its_own_width_and_colours() -> None:
    """A program on a pseudo terminal of 57 columns, asked what it sees."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 57, 0, 0))
    code = "from meshbpf.cli import output; print(output.screen())"
    environment = {key: value for key, value in os.environ.items() if key not in ("COLUMNS", "NO_COLOR")}
    subprocess.run(
        [sys.executable, "-c", code], stdin=theirs, stdout=theirs, check=True, timeout=30,
        env={**environment, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    assert os.read(ours, 200).decode().strip() == "Screen(width=57, colour=True)"
    os.close(ours)


@pytest.mark.parametrize(("form", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_structured_output_has_everything_and_its_version(
    form: str, read: object, capsys: pytest.CaptureFixture[str]
) -> None:
    output.show(form, COLUMNS, ROWS, "services")
    assert read(capsys.readouterr().out) == {"schemaVersion": 1, "services": ROWS}  # type: ignore[operator]


def test_an_unknown_format_is_a_usage_error() -> None:
    assert output.check_format("hosts", ("hosts",)) == "hosts"
    with pytest.raises(typer.BadParameter, match="table, wide, json, yaml"):
        output.check_format("xml")


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0, "0s"), (0.9, "0s"), (59, "59s"), (60, "1m"), (130, "2m10s"), (3600, "1h"), (3660, "1h1m"), (14700, "4h5m"),
     (86400, "1d"), (784800, "9d2h")],
)  # fmt: skip
def test_ages_have_two_units(seconds: float, text: str) -> None:
    assert layout.age(seconds) == text
