"""A start that ends before it is one: whatever had begun by then, the compiler above all, ends as well."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.support.machine import CLI, ROOT, Machine, service, until

MARK = "MESHBPF_TEST_START"
MANY = 2000  # services: they take longer to read than a compiler takes to begin


@pytest.fixture
def mark(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> Iterator[bytes]:
    """In the environment of all that a start starts."""
    monkeypatch.setenv(MARK, machine.instance.name)
    mark = f"{MARK}={machine.instance.name}".encode()
    yield mark
    until(lambda: not started(mark), "all has ended")


def started(mark: bytes) -> list[str]:
    """The command lines of what lives and was started by what we started."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0") and int(folder.name) != os.getpid():
                found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode())
        except (FileNotFoundError, ProcessLookupError, PermissionError):
            continue  # it has just ended, or is not ours
    return found


def configure(machine: Machine, last: str = "") -> None:
    """A file that takes a second to read, and what stands at its end."""
    path = machine.configure()
    many = [service(f"s{n}", f"127.96.{n >> 8}.{n & 255}", [8081, 8082]) for n in range(1, MANY)]
    path.write_text(f"{path.read_text()}---\n{yaml.dump_all(many, Dumper=yaml.CSafeDumper)}{last}")


def arguments(machine: Machine) -> list[str]:
    config = str(machine.folder / "config")
    return ["run", "--cgroup", str(machine.cgroup), "-c", config, "--instance", machine.instance.name]


def test_a_bad_file_is_told_while_something_compiles_and_nothing_is_left(machine: Machine, mark: bytes) -> None:
    configure(machine, "---\nkind: Servise\n")
    run = machine.start([*CLI, *arguments(machine)], stderr=subprocess.PIPE, text=True)
    until(lambda: any("loader.compile" in line for line in started(mark)), "it compiles")
    _out, said = run.communicate(timeout=30)
    assert run.returncode == 65, said
    assert 'unknown kind "Servise"' in said
    assert "Traceback" not in said
    assert not started(mark)
    assert not machine.instance.pins.exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL, signal.SIGINT])
def test_a_start_that_is_ended_while_it_reads_leaves_nothing(
    machine: Machine, mark: bytes, number: signal.Signals
) -> None:
    configure(machine)
    run = machine.start([*CLI, *arguments(machine)], stderr=subprocess.DEVNULL)
    until(lambda: any("loader.compile" in line for line in started(mark)), "it compiles")
    run.send_signal(number)
    assert run.wait(20) != 0
    until(lambda: not started(mark), "all has ended")
    assert not machine.instance.pins.exists()


def test_a_compiler_that_fails_while_files_are_read_is_told_when_it_is_needed(
    machine: Machine, mark: bytes, tmp_path: Path
) -> None:
    """Of a bad file and a bad compiler the file is told, as when nothing had begun."""
    broken = tmp_path / "python"
    broken.write_text(
        f'#!/bin/sh\ncase "$*" in *loader.compile*) echo \'{{"error": "compile: broken"}}\'; exit 1;; esac\n'
        f'exec {sys.executable} "$@"\n'
    )
    broken.chmod(0o755)
    begin = f"import sys; sys.executable = {str(broken)!r}; from meshbpf.cli import main; main()"
    for last, code, words in (("---\nkind: Servise\n", 65, "unknown kind"), ("", 1, "compile: broken")):
        configure(machine, last)
        done = subprocess.run(
            [sys.executable, "-c", begin, *arguments(machine)],
            capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
        )  # fmt: skip
        assert done.returncode == code, done.stderr
        assert words in done.stderr
        assert not machine.instance.pins.exists()


def test_other_sizes_than_the_usual_ones_are_compiled_for(machine: Machine) -> None:
    """Also where a file names them in a way that nobody foresees: then it is compiled twice."""
    machine.agent_spec["maps"] = {"services": 999}
    path = machine.configure(service("orders", "127.96.0.10", [machine.endpoint("a")]))
    path.write_text(path.read_text().replace("maps:", '"m\\x61ps":'))
    machine.run_agent()
    assert machine.curl("http://127.96.0.10/")["endpoint"] == "a"
    (row,) = [row for row in machine.show("maps")["maps"] if row["name"] == "services"]
    assert row["capacity"] == 999
    machine.stop_agent()
