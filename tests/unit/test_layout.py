"""Lines that fit: what is wrapped, what goes, what stays; and that nothing is cut."""

from __future__ import annotations

import re

import pytest

from meshbpf.cli import layout
from meshbpf.cli.layout import Column, Screen, cell, facts, printable, table, wrap

COLUMNS = (
    Column("name", "NAME"),
    Column("count", "COUNT", drop=1),
    Column("share", "SHARE", drop=2, form=layout.percent),
    Column("text", "MEANS", wrap=10),
    Column("state", "STATE", moods=True),
    Column("source", "SOURCE", wide=True),
)
ROWS = [
    {"name": "orders", "count": 5, "share": 12.5, "text": "one two three four five", "state": "ok", "source": "a:1:1"},
    {"name": "b", "count": None, "share": None, "text": "", "state": "error", "source": "b:1:1"},
]


def at(width: int | None, wide: bool = False) -> str:
    return table(COLUMNS, ROWS, Screen(width), wide)


def test_where_nobody_looks_a_row_is_a_line() -> None:
    assert at(None).splitlines() == [
        "NAME    COUNT  SHARE  MEANS                    STATE",
        "orders      5  12.5%  one two three four five  ok",
        "b           -      -  -                        error",
    ]


def test_prose_is_wrapped_first() -> None:
    assert at(44).splitlines() == [
        "NAME    COUNT  SHARE  MEANS            STATE",
        "orders      5  12.5%  one two three    ok",
        "                      four five",
        "b           -      -  -                error",
    ]


def test_then_what_matters_least_goes_and_it_is_said() -> None:
    assert at(35).splitlines() == [
        "NAME    COUNT  MEANS          STATE",
        "orders      5  one two three  ok",
        "               four five",
        "b           -  -              error",
        "(SHARE left out for want of room:",
        "-o wide)",
    ]


def test_what_matters_stays_however_narrow() -> None:
    assert at(1).splitlines()[:4] == [
        "NAME    MEANS       STATE", "orders  one two     ok", "        three four", "        five",
    ]  # fmt: skip


@pytest.mark.parametrize("width", [None, *range(1, 130)])
def test_wide_has_everything_and_nothing_is_ever_cut(width: int | None) -> None:
    words = set(re.findall(r"[\w:%.]+", at(None, wide=True)))
    assert set(re.findall(r"[\w:%.]+", at(width, wide=True))) == words
    kept = {str(value) for row in ROWS for key in ("name", "text", "state") for value in str(row[key]).split()}
    assert kept <= set(re.findall(r"\w+", at(width)))


def test_no_rows_show_the_heads() -> None:
    assert table(COLUMNS, [], Screen(80)) == "NAME  COUNT  SHARE  MEANS  STATE"


def test_colours_are_the_state_s_and_add_no_width() -> None:
    painted = table(COLUMNS, ROWS, Screen(80, colour=True))
    assert "\x1b[32mok\x1b[0m" in painted and "\x1b[31merror\x1b[0m" in painted
    assert re.sub(r"\x1b\[\d+m", "", painted) == at(80)
    assert "\x1b[33mWARNING\x1b[0m  hot" in facts([("WARNING", "hot")], Screen(80, colour=True))


def test_facts_hang_below_their_beginning() -> None:
    rows = [("MESH", "generation 7"), ("WARNING", "map slots is nearly full: raise the field")]
    assert facts(rows, Screen(34)).splitlines() == [
        "MESH     generation 7", "WARNING  map slots is nearly full:", "         raise the field",
    ]  # fmt: skip
    assert facts(rows, Screen()).splitlines()[1] == "WARNING  map slots is nearly full: raise the field"


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("one two", ["one two"]),
        ("one two three", ["one two", "three"]),
        ("/kubepods/pod/x", ["/kubepods/", "pod/x"]),
        ("a 127.96.0.10,fd00::10", ["a", "127.96.0.1", "0,fd00::10"]),
        ("::1,127.96.0.1", ["::1,", "127.96.0.1"]),
        ("", [""]),
    ],
)
def test_long_words_go_on_behind_a_slash_or_comma(text: str, lines: list[str]) -> None:
    assert wrap(text, 10) == lines


def test_no_data_is_a_dash_and_zero_is_data() -> None:
    assert [cell(value) for value in (None, "", {}, 0, {"a": 1, "b": 2})] == ["-", "-", "-", "0", "a 1, b 2"]
    assert [cell(0.0, layout.percent), cell(99.94, layout.percent), cell(None, layout.age)] == ["0.0%", "99.9%", "-"]


def test_a_name_does_not_steer_the_terminal() -> None:
    assert printable("a\x1b[2Jb\n") == "a\\x1b[2Jb\\n"
    assert "\x1b" not in table(COLUMNS, [{"name": "\x1b[31m"}], Screen(80))
