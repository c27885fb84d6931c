"""Tables, JSON and YAML as people and scripts see them."""

from __future__ import annotations

import json

import pytest
import typer
import yaml

from meshbpf.cli import output

HEADS = {"service": "SERVICE", "open": "OPEN", "source": "SOURCE"}
ROWS = [
    {"service": "orders", "open": 0, "source": "mesh.yaml:3:1"},
    {"service": "a-long-name.shop", "open": None, "source": ""},
]


def test_columns_are_as_wide_as_their_widest_cell() -> None:
    assert output.table(["A", "LONG"], [["xyz", 1], ["", None]]) == "A    LONG\nxyz  1\n-    -"


def test_no_rows_show_the_heads() -> None:
    assert output.table(["A", "B"], []) == "A  B"


def test_no_data_is_a_dash_and_zero_is_data(capsys: pytest.CaptureFixture[str]) -> None:
    output.show("table", HEADS, ROWS, "services", wide=("source",))
    assert capsys.readouterr().out == "SERVICE           OPEN\norders            0\na-long-name.shop  -\n"


def test_wide_shows_every_column(capsys: pytest.CaptureFixture[str]) -> None:
    output.show("wide", HEADS, ROWS, "services", wide=("source",))
    assert capsys.readouterr().out.splitlines()[0] == "SERVICE           OPEN  SOURCE"


@pytest.mark.parametrize(("form", "read"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_structured_output_has_everything_and_its_version(
    form: str, read: object, capsys: pytest.CaptureFixture[str]
) -> None:
    output.show(form, HEADS, ROWS, "services", wide=("source",))
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
    assert output.age(seconds) == text
