"""`meshbpf completion`: the script, sourced by a real bash, completes commands, options and names; and says no word."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer
from typer.testing import CliRunner

from loader.instance import Instance
from meshbpf import cli, wire
from meshbpf.cli import completion
from meshbpf.model import Mesh, Service

ROOT = Path(__file__).resolve().parents[2]
# A program of the name that people type; where instances are is told to it, because the real place is root's.
MAIN = """
import pathlib, sys
sys.argv[0] = "meshbpf"
import loader.instance
loader.instance.RUN = pathlib.Path(sys.argv.pop(1))
from meshbpf.cli import main
main()
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Path]:
    """The folder that instances are in, with `meshbpf` beside it."""
    program = tmp_path / "bin" / "meshbpf"
    program.parent.mkdir()
    program.write_text(f'#!/bin/sh\nexec {sys.executable} -c {shlex.quote(MAIN)} {tmp_path}/run "$@"\n')
    program.chmod(0o755)
    (tmp_path / "run").mkdir()
    yield tmp_path / "run"


def attach(run: Path, name: str, *services: Service) -> None:
    folder = run / name
    folder.mkdir()
    (folder / "state.json").write_text(f'{{"layout": "x", "mesh": {wire.text(Mesh(services=services))}}}')


def typed(run: Path, *words: str) -> list[str]:
    """What bash offers for the last of the words when Tab is pressed. Nothing else may appear."""
    line = " ".join(shlex.quote(word) for word in ("meshbpf", *words))
    code = (
        "source <(meshbpf completion bash) || exit 1\n"
        f"COMP_WORDS=({line}); COMP_CWORD={len(words)}\n"
        "_meshbpf_completion meshbpf\n"
        'printf "%s\\n" "${COMPREPLY[@]}"'
    )
    path = f"{run.parent / 'bin'}:{os.environ['PATH']}"
    done = subprocess.run(
        ["bash", "--norc", "-c", code], capture_output=True, text=True, check=False, timeout=60,
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, ""), done
    return done.stdout.split()


SERVICES = (Service("ledger"), Service("orders"), Service("orders", "shop"))


def test_commands_options_and_names(run: Path) -> None:
    attach(run, "default", *SERVICES)
    attach(run, "other", Service("elsewhere"))
    assert typed(run, "conn") == ["connections"]
    assert typed(run, "endpoints", "--inst") == ["--instance"]
    assert typed(run, "endpoints", "or") == ["orders", "orders.shop"]
    assert typed(run, "explain", "--instance", "other", "") == ["elsewhere"]
    assert typed(run, "status", "--instance", "") == ["default", "other"]
    assert typed(run, "edges", "-o", "j") == ["json"]


def test_nothing_attached_offers_nothing(run: Path) -> None:
    assert typed(run, "endpoints", "") == []
    (run / "default").mkdir()
    (run / "default" / "state.json").write_text("{")
    assert typed(run, "endpoints", "") == []


@pytest.mark.parametrize("state", ["[]", "{}", '{"mesh": {"services": [{}]}}', '{"mesh": 3}', "\udcff"])
def test_a_state_of_nobody_s_is_no_trouble(state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("loader.instance.RUN", tmp_path)
    Instance("default").run.mkdir()
    Instance("default").state_file.write_bytes(state.encode("utf-8", "surrogateescape"))
    context = typer.Context(typer.main.get_command(cli.app))
    assert completion.services(context, "") == []
    context.params["instance"] = "NOT A NAME"
    assert completion.services(context, "") == []


@pytest.mark.parametrize("shell", list(completion.Shell))
def test_each_shell_has_a_script(shell: completion.Shell) -> None:
    shown = CliRunner().invoke(cli.app, ["completion", shell]).output
    assert completion.VARIABLE in shown and "meshbpf" in shown


def test_no_other_shell() -> None:
    assert CliRunner().invoke(cli.app, ["completion", "tcsh"]).exit_code == 2


def test_a_key_press_does_not_load_a_server() -> None:
    """What completes a line is loaded by every key press, and by `exec` before every program of a host."""
    code = "import sys, meshbpf.cli; print(sorted({'aiohttp', 'bcc', 'uvloop', 'pyroute2'} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT, timeout=60
    )
    assert done.stdout == "[]\n"
