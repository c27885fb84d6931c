"""The tutorial as a text: its shell is well formed, it fits a terminal, and what a run may change is little enough."""

from __future__ import annotations

import subprocess

import pytest

from tests.support.tutorial import PAGE, Block, blocks, same

BLOCKS = list(blocks(PAGE.read_text()))


def test_no_block_goes_unseen() -> None:
    fences = [line for line in PAGE.read_text().splitlines() if line.startswith("```")]
    assert len(fences) == 2 * (len(BLOCKS) + sum(block.shown is not None for block in BLOCKS))
    assert len(BLOCKS) > 20 and sum(block.looks for block in BLOCKS) > 10


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: f"line {block.line}")
def test_a_block_is_well_formed_and_fits_a_terminal(block: Block) -> None:
    done = subprocess.run(["bash", "-n"], input=block.typed, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert [line for line in block.typed.splitlines() if len(line) > 100] == []


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("     11 orders from a\n", "20 orders from a\n"),
        ("SOURCE  files, 1 service, last change 9s ago", "SOURCE  files, 1 service, last change 1m2s ago"),
        ("CLIENT 127.0.0.1:54321  PID 4711", "CLIENT 127.0.0.1:40112  PID 12"),
        ("kept /tmp/tmp.aB3/host-a/registry.db", "kept /tmp/elsewhere/tmp.xY/host-a/registry.db"),
        ("removed agent 12\nremoved link 77-connect4", "removed agent 345\nremoved link 8-connect4"),
        ("ACCELERATION  off (no BTF)\nSOURCE  x", "ACCELERATION  redirect\nSOURCE  x"),
    ],
)
def test_what_varies(one: str, other: str) -> None:
    assert same(one) == same(other)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("FAILED\n     0", "FAILED\n     9"),
        ("127.0.0.1:8082  ready", "127.0.0.1:8083  ready"),
        ("127.0.0.1:8082  ready", "127.0.0.1:8082  draining"),
        ("orders  2/2", "orders  1/2"),
        ("50% of new connections", "100% of new connections"),
        ("last change 9s ago", "last change 9s ago, no good answer for 3s"),
        ("127.96.26.31", "127.96.26.32"),
    ],
)
def test_what_does_not(one: str, other: str) -> None:
    assert same(one) != same(other)
