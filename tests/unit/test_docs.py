"""The docs keep up: every check id and every reason has its place in docs/troubleshooting.md, and none is left over."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import typer

from loader import trials
from meshbpf import cli
from meshbpf.cli import findings
from meshbpf.reason import REMEDY, Reason

ROOT = Path(__file__).resolve().parents[2]
TROUBLESHOOTING = (ROOT / "docs" / "troubleshooting.md").read_text()
HEADINGS = set(re.findall(r"^#+ `([^`]+)`$", TROUBLESHOOTING, re.M))
ROWS = set(re.findall(r"^\| `([^`]+)` \|", TROUBLESHOOTING, re.M))
SELF_TEST = ["kernel", "load", *(trial.ours.__name__.replace("_", "-") for trial in trials.TRIALS)]


@pytest.mark.parametrize("id", [*findings.CATALOGUE, *map(findings.self_test_id, SELF_TEST)])
def test_every_check_id_is_documented(id: str) -> None:
    assert id in HEADINGS | ROWS


@pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.word)
def test_every_reason_is_documented(reason: Reason) -> None:
    assert reason.word in ROWS


@pytest.mark.parametrize("reason", list(Reason), ids=lambda reason: reason.word)
def test_a_reason_s_remedy_is_the_same_here_and_there(reason: Reason) -> None:
    """What `meshbpf reasons` advises stands in the last cell; where it advises nothing, so does the cell."""
    (row,) = re.findall(rf"^\| `{reason.word}` \|.*\| (.*) \|$", TROUBLESHOOTING, re.M)
    said = re.sub(r"\[([^]]*)\]\([^)]*\)", r"\1", row).replace("`", "")
    assert said == REMEDY[reason] if reason in REMEDY else said.startswith("nothing")


def test_nothing_is_documented_that_is_gone() -> None:
    known = {reason.word for reason in Reason} | set(findings.CATALOGUE) | set(map(findings.self_test_id, SELF_TEST))
    assert known >= HEADINGS | ROWS


def test_every_command_is_documented() -> None:
    page = (ROOT / "docs" / "commands.md").read_text().partition("\n## ")[0]
    commands = {command.name for command in typer.main.get_command(cli.app).commands.values()}  # type: ignore[attr-defined]
    assert set(re.findall(r"^\| `(\w+)` \|", page, re.M)) == commands


def test_readme_fits_a_terminal() -> None:
    """What is pasted from a run, or to be typed, is not cut off."""
    blocks = re.findall(r"^```\w*\n(.*?)^```", (ROOT / "README.md").read_text(), re.M | re.S)
    assert blocks
    assert [line for block in blocks for line in block.splitlines() if len(line) > 100] == []
