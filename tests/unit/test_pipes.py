"""Who holds a pipe that could carry payload is known by it, and those who have ended are let go."""

from __future__ import annotations

import os
import subprocess
import sys

from loader.pipes import Pipes

HOLDS = "import os, sys; kept = os.pipe() if sys.argv[1:] else None; print(1, flush=True); sys.stdin.read()"


def program(*arguments: str) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-c", HOLDS, *arguments]
    made = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert made.stdout is not None
    made.stdout.readline()
    return made


def end(process: subprocess.Popen[bytes]) -> None:
    process.communicate(timeout=10)


def test_a_process_with_both_ends_of_a_pipe_may_splice() -> None:
    pipes, without, holder = Pipes(), program(), program("pipe")
    assert not pipes.may_splice(without.pid)
    assert pipes.may_splice(holder.pid)
    for process in (without, holder):
        end(process)
        assert pipes.may_splice(process.pid), "who has ended cannot be seen"
    pipes.close()


def test_a_process_that_has_ended_costs_no_descriptor() -> None:
    before = len(os.listdir("/proc/self/fd"))
    pipes = Pipes()
    for _ in range(3):
        process = program()
        pipes.may_splice(process.pid)
        end(process)
    last = program()
    pipes.may_splice(last.pid)
    assert len(pipes._looks) == 1
    end(last)
    pipes.close()
    assert len(os.listdir("/proc/self/fd")) == before
