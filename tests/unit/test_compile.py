"""Who compiles: a child that has begun with the same defines, else a new one; and none is left. bcc is a stand-in."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import pytest

from loader.compile import Compiler, Job
from meshbpf.errors import DataplaneError, EnvironmentLack
from tests.support.machine import ROOT, until

OURS = sys.executable
PYTHON = """\
#!/bin/sh
exec {python} -c '
import os, runpy, sys, time, types
bcc = types.ModuleType("bcc")
bcc.lib = types.SimpleNamespace(bpf_table_name=types.SimpleNamespace(), bpf_num_tables=lambda _module: 0)
def BPF(text, cflags):
    open("{log}", "a").write(f"{{os.getpid()}} {{cflags[0]}}\\n")
    {compiling}
    return types.SimpleNamespace(module=0)
bcc.BPF = BPF
sys.modules["bcc"] = {bcc}
runpy.run_module("loader.compile", run_name="__main__")
'
"""


@pytest.fixture
def compiler() -> Iterator[Compiler]:
    with closing(Compiler()) as made:
        yield made


@pytest.fixture
def python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes the children's Python one whose bcc does this; returns where they say that they compile."""

    def make(compiling: str = "pass", bcc: str = "bcc") -> Path:
        script, log = tmp_path / "python", tmp_path / "log"
        script.write_text(PYTHON.format(python=OURS, log=log, compiling=compiling, bcc=bcc))
        script.chmod(0o755)
        log.touch()
        monkeypatch.setattr(sys, "executable", str(script))
        return log

    return make


def job(size: int) -> Job:
    return Job("maps", "stage", {"SIZE": size}, ())


def compiled(log: Path) -> list[str]:
    return [line.split()[1] for line in log.read_text().splitlines()]


def pid(log: Path) -> int:
    return int(until(log.read_text, "it compiles").split()[0])


def alive(pid: int) -> bool:
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False


def test_a_job_is_done_by_the_child_that_has_begun(compiler: Compiler, python: Callable[..., Path]) -> None:
    log = python()
    compiler.begin({"SIZE": 1})
    compiler.begin({"SIZE": 1})
    pid(log)
    assert compiler.run(job(1)) == {}
    assert compiled(log) == ["-DSIZE=1"]


def test_other_defines_need_another_child(compiler: Compiler, python: Callable[..., Path]) -> None:
    log = python()
    compiler.begin({"SIZE": 1})
    first = pid(log)
    assert compiler.run(job(2)) == {}
    assert compiled(log) == ["-DSIZE=1", "-DSIZE=2"]
    assert not alive(first)


def test_a_child_that_failed_before_it_had_a_job_says_why(compiler: Compiler, python: Callable[..., Path]) -> None:
    log = python('raise Exception("broken")')
    compiler.begin({"SIZE": 1})
    first = pid(log)
    until(lambda: not alive(first), "it has ended")
    with pytest.raises(DataplaneError, match="compile: broken"):
        compiler.run(job(1))
    python("os._exit(3)")
    with pytest.raises(DataplaneError, match="the compiler process ended with 3"):
        compiler.run(job(1))
    python(bcc="None")
    with pytest.raises(EnvironmentLack, match="bcc"):
        compiler.run(job(1))


def test_closing_ends_a_child_in_the_middle_of_compiling(compiler: Compiler, python: Callable[..., Path]) -> None:
    log = python("time.sleep(600)")
    compiler.begin({"SIZE": 1})
    child = pid(log)
    compiler.close()
    assert not alive(child)
    compiler.close()


def test_what_is_said_to_our_process_group_is_not_said_to_the_compiler(
    compiler: Compiler, python: Callable[..., Path]
) -> None:
    log = python()
    compiler.begin({"SIZE": 1})
    assert os.getpgid(pid(log)) != os.getpgid(0)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_child_does_not_outlive_who_began_it(python: Callable[..., Path], number: signal.Signals) -> None:
    log = python("time.sleep(600)")
    begin = (
        f"import sys, time; sys.executable = {sys.executable!r}; from loader.compile import Compiler;"
        ' Compiler().begin({"SIZE": 1}); time.sleep(600)'
    )
    with subprocess.Popen([OURS, "-c", begin], cwd=ROOT) as parent:
        try:
            child = pid(log)
            os.kill(parent.pid, number)
        finally:
            parent.kill()
    until(lambda: not alive(child), "the child has ended")


def test_ctrl_c_ends_the_child_that_has_a_job(python: Callable[..., Path], tmp_path: Path) -> None:
    """It would go on pinning tables after the lock of whoever began it is free."""
    log = python(compiling="time.sleep(60)")
    code = (
        "import sys; from loader.compile import Compiler, Job\n"
        "sys.executable = sys.argv[1]; Compiler().run(Job('m', 's', {'A': 1}, ()))"
    )
    parent = subprocess.Popen([OURS, "-c", code, str(tmp_path / "python")], cwd=ROOT, stderr=subprocess.DEVNULL)
    child = pid(log)
    parent.send_signal(signal.SIGINT)
    assert parent.wait(10) != 0
    until(lambda: not alive(child), "the child has ended")


def test_a_job_that_was_not_told_to_its_end_is_none(python: Callable[..., Path]) -> None:
    python(compiling="time.sleep(60)")
    command = [sys.executable, "-P", "-m", "loader.compile"]
    with subprocess.Popen(
        command, stdin=subprocess.PIPE, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}
    ) as child:
        assert child.stdin is not None
        child.stdin.write(b'{"A": 1}\n{"maps": "m", "stag')
        child.stdin.close()
        assert child.wait(10) == 0
