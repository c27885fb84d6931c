"""Starts the demo's processes: each in its part's namespace and cgroup, each awaited by what it says, each with an end.

Children are sessions of their own, so that Ctrl-C reaches the demo alone, which then takes everything away in order.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

from loader import environment
from loader.source import BPF
from meshbpf.demo import cast
from meshbpf.errors import MeshError

SECONDS = 15.0
# Join a cgroup ($0) and a namespace ($1), then become the program. No preexec_fn: we have threads, and a fork of them
# that runs Python may wait for ever for a lock that nobody holds any more.
ENTER = 'echo $$ >"$0" && net=$1 && shift && exec nsenter --net="$net" -- "$@"'
# Children import us wherever we lie, and with -P nothing that lies in the working directory.
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(BPF.parent)}
COLUMNS = 78  # of a terminal's 80, two are the margin of what commands print
MESHBPF = (sys.executable, "-P", "-m", "meshbpf.cli")


def free_port(wanted: int) -> int:
    """`wanted`, or any free one when somebody has it."""
    for port in (wanted, 0):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise MeshError("no free port on 127.0.0.1")


def until(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """The first true value; for what offers no event to wait on. Raises MeshError after `seconds`."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        if time.monotonic() > deadline:
            raise MeshError(f"not within {seconds:.0f} s: {what}")
        time.sleep(0.02)
    return value


def agent_says() -> str:
    """The end of its log: the file itself goes with everything else."""
    return cast.AGENT_LOG.read_text()[-2000:] if cast.AGENT_LOG.exists() else "-"


class Scene:
    def __init__(self) -> None:
        self.top = environment.cgroup2() / cast.CGROUP
        self.processes: list[subprocess.Popen[str]] = []
        self.agent: subprocess.Popen[str] | None = None

    def make_cgroups(self) -> None:
        self.top.mkdir()
        for part in cast.PARTS:
            (self.top / part).mkdir()

    def popen(self, part: str, command: Sequence[str], in_mesh: bool = True, **options: Any) -> subprocess.Popen[str]:
        """Start `command` in the part's namespace, and in its cgroup if `in_mesh`."""
        procs = str(self.top / part / "cgroup.procs") if in_mesh else "/dev/null"
        enter = ["sh", "-c", ENTER, procs, f"/run/netns/{cast.namespace(part)}"]
        process = subprocess.Popen([*enter, *command], text=True, start_new_session=True, env=ENVIRONMENT, **options)
        self.processes.append(process)
        return process

    def call(self, part: str, *command: str, in_mesh: bool = True) -> str:
        """Run to the end; what it printed. Raises MeshError with its words when it fails."""
        process = self.popen(part, command, in_mesh, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
        try:
            out, err = process.communicate(timeout=SECONDS)
        except subprocess.TimeoutExpired as error:
            process.kill()
            raise MeshError(f"{command[0]} did not end in {SECONDS:.0f} s") from error
        if process.returncode != 0:
            raise MeshError(f"{command[0]} failed ({process.returncode}): {err.strip() or out.strip()}")
        return out

    def load(self, url: str, count: int, keep: bool = False, in_mesh: bool = True) -> dict[str, Any]:
        more = ["keep"] if keep else []
        answer: dict[str, Any] = json.loads(
            self.call("web", sys.executable, "-P", "-m", "meshbpf.demo.caller", url, str(count), *more, in_mesh=in_mesh)
        )
        return answer

    def service(self, part: str, kind: str, port: int) -> subprocess.Popen[str]:
        """Start a small service; `listening` is awaited by `said`."""
        command = [sys.executable, "-P", "-m", "meshbpf.demo.apps", kind, part, cast.PARTS[part], str(port)]
        return self.popen(part, command, stdout=subprocess.PIPE)

    def registered(self, part: str, service: str, kind: str, port: int) -> subprocess.Popen[str]:
        """Start it under `meshbpf register`, which puts it into the agent's registry once it accepts connections."""
        address = cast.PARTS[part]
        program = [sys.executable, "-P", "-m", "meshbpf.demo.apps", kind, part, address, str(port)]
        options = ["--port", f"{kind}={port}/{kind}", "--address", address, "--instance", cast.INSTANCE]
        command = [*MESHBPF, "register", service, *options, "--", *program]
        return self.popen(part, command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)

    def run_agent(self) -> None:
        """`meshbpf run` until it says that it is ready. Its words go to the log file."""
        command = [*MESHBPF, "run", "--cgroup", cast.CGROUP, "-c", str(cast.CONFIG), "--instance", cast.INSTANCE]
        self.agent = subprocess.Popen(
            command,
            text=True,
            start_new_session=True,
            env=ENVIRONMENT,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )
        self.processes.append(self.agent)
        assert self.agent.stderr is not None
        if not said(self.agent.stderr, " ready instance=", cast.AGENT_LOG):
            raise MeshError("the agent did not start")

    def show(self, *arguments: str) -> str:
        """What a reading command prints."""
        command = [*MESHBPF, *arguments, "--instance", cast.INSTANCE]
        screen = {**ENVIRONMENT, "COLUMNS": str(COLUMNS)}
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS, env=screen)
        if done.returncode != 0:
            raise MeshError(f"meshbpf {' '.join(arguments)} failed ({done.returncode}): {done.stderr.strip()}")
        return done.stdout.rstrip()

    def close(self) -> None:
        """Reap what `cleanup` has ended."""
        for process in self.processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdout, process.stderr):
                if stream is not None and not stream.closed:
                    stream.close()


def said(stream: IO[str], word: str, copy: Path | None = None, seconds: float = SECONDS) -> bool:
    """Whether a line with `word` comes within `seconds`. A thread reads on to the end, so that nobody blocks on us."""
    heard, found = threading.Event(), threading.Event()

    def read() -> None:
        with open(copy or os.devnull, "a") as out:
            for line in stream:
                out.write(line)
                out.flush()
                if word in line:
                    found.set()
                    heard.set()
        heard.set()

    threading.Thread(target=read, name="demo output", daemon=True).start()
    heard.wait(seconds)
    return found.is_set()
