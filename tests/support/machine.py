"""A small mesh machine for tests: a cgroup of its own, endpoints, an agent, clients, namespaces; all gone at the end.

Everything is bounded in time; processes are ended by id; service addresses lie in 127.96.0.0/16 or in namespaces that
were made here.
"""

from __future__ import annotations

import itertools
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from loader import environment
from loader.instance import Instance
from meshbpf.cli import ask
from meshbpf.demo import plumbing

ROOT = Path(__file__).resolve().parent.parent.parent
SECONDS = 20.0
Done = subprocess.CompletedProcess[str]
ACCIDENTS = ("Exception in callback", "Traceback", "task died")  # never in the agent's log
CLI = (sys.executable, "-m", "meshbpf.cli")


class Load:
    """A running tests/support/load.py. `stop` ends it and gives what came of it."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        assert process.stdout.readline() == "begun\n", "the load got no answer"

    def stop(self) -> dict[str, Any]:
        out, _err = self.process.communicate(timeout=SECONDS)
        result: dict[str, Any] = json.loads(out)
        return result


_ports = itertools.count(os.getpid() * 16)


def free_port() -> int:
    """A port nobody listens on right now, and none that an endpoint could be given when it asks for any."""
    while True:
        port = 20000 + next(_ports) % 12000
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def until(condition: Callable[[], Any], what: str, seconds: float = SECONDS) -> Any:
    """The condition's first true value; fails after `seconds`. For what offers no event to wait on."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"not within {seconds:.0f} s: {what}"
        time.sleep(0.01)
    return value


class Machine:
    """Use as a context manager. `name` is the instance's and the cgroup's name."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder = folder
        self.instance = Instance(name)
        self.cgroup = environment.cgroup2() / name
        self.proxy_port = free_port()
        self.admin_port = free_port()
        self.registry_port = free_port()
        self.access_log = folder / "access.log"
        self.agent_spec: dict[str, Any] = {}
        self.agent: subprocess.Popen[bytes] | None = None
        self.agent_log = folder / "agent.log"
        self._processes: list[subprocess.Popen[Any]] = []
        self._namespaces: list[str] = []

    def __enter__(self) -> Machine:
        self.cgroup.mkdir(exist_ok=True)
        return self

    def __exit__(self, kind: object, *exc: object) -> None:
        if self.agent is not None and self.agent.poll() is None:
            self.agent.send_signal(signal.SIGCONT)
            self.stop_agent()
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout, process.stderr):
                if stream is not None:
                    stream.close()
        detached = self.detach()
        for name in self._namespaces:
            plumbing.remove(name)
        self._remove_cgroup()
        if kind is None:
            log = self.log() if self.agent_log.exists() else ""
            assert not [word for word in ACCIDENTS if word in log], log
            assert detached.returncode == 0, detached.stderr
            assert not self.instance.pins.exists() and not self.instance.run.exists(), "something is left"

    def _remove_cgroup(self) -> None:
        until(self.removed_cgroup, f"{self.cgroup} is empty")

    def removed_cgroup(self) -> bool:
        """Remove the cgroup and those below it; whether that worked: processes take a moment to end."""
        for folder in [*sorted(self.cgroup.rglob("*/"), reverse=True), self.cgroup]:
            try:
                folder.rmdir()
            except OSError:
                return False
        return True

    # --- configuration -------------------------------------------------------------------------------------------

    def configure(self, *documents: dict[str, Any], name: str = "mesh.yaml") -> Path:
        """Write the configuration (an Agent document of ours comes first) in one step, as a careful editor would."""
        agent = {
            "proxy": {"listen": f"127.0.0.1:{self.proxy_port}", "drain": "3s"},
            "admin": {"listen": f"127.0.0.1:{self.admin_port}"},
            "accessLog": {"format": "json", "path": str(self.access_log)},
            "registries": [
                {"embedded": {"listen": f"127.0.0.1:{self.registry_port}", "store": str(self.folder / "registry.db")}}
            ],
            **self.agent_spec,
        }
        whole = [{"apiVersion": "meshbpf.io/v1", "kind": "Agent", "spec": agent}, *documents]
        path = self.folder / "config" / name
        path.parent.mkdir(exist_ok=True)
        staged = self.folder / f"{name}.staged"
        staged.write_text(yaml.safe_dump_all(whole))
        staged.replace(path)
        return path

    # --- commands ------------------------------------------------------------------------------------------------

    def meshbpf(self, *arguments: str, **options: Any) -> Done:
        # readline, which pytest imports, tells children of a screen of 80 columns behind os.environ's back.
        options.setdefault("env", dict(os.environ))
        return subprocess.run(
            [*CLI, *arguments],
            capture_output=True, text=True, check=False, timeout=60, cwd=ROOT, **options,
        )  # fmt: skip

    def attach(self) -> Done:
        done = self.meshbpf(
            "attach", "--cgroup", str(self.cgroup), "-c", str(self.folder / "config"), "--instance", self.instance.name
        )
        assert done.returncode == 0, done.stderr
        return done

    def detach(self) -> Done:
        return self.meshbpf("detach", "--instance", self.instance.name)

    def show(self, *arguments: str) -> dict[str, Any]:
        """A reading command's JSON."""
        done = self.meshbpf(*arguments, "--instance", self.instance.name, "-o", "json")
        assert done.returncode == 0, done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value

    def run_to_end(self, *more: str) -> Done:
        """`meshbpf run` that is expected to end by itself."""
        arguments = ["run", "--cgroup", str(self.cgroup), "-c", str(self.folder / "config")]
        return self.meshbpf(*arguments, "--instance", self.instance.name, *more)

    def run_agent(self, *more: str, cgroup: Path | None = None, through: Sequence[str] = ()) -> subprocess.Popen[bytes]:
        """Start `meshbpf run` and wait until it says that it is ready. `through`: a command that becomes it elsewhere,
        in other namespaces.
        """
        arguments = ["--cgroup", str(self.cgroup), "-c", str(self.folder / "config")]
        with self.agent_log.open("ab") as log:
            begin = log.tell()
            self.agent = subprocess.Popen(
                self._joined([*through, *CLI, "run", *arguments, "--instance", self.instance.name, *more], cgroup),
                stderr=log, stdout=log, cwd=ROOT,
            )  # fmt: skip
        self._processes.append(self.agent)

        def ready() -> bool:
            assert self.agent is not None and self.agent.poll() is None, self.agent_log.read_text()
            return " ready instance=" in self.agent_log.read_text()[begin:]

        until(ready, "the agent is ready")
        return self.agent

    def agent_says(self) -> dict[str, Any]:
        """The agent's own status."""
        answer = ask.get(self.instance, "/v1/status")
        assert answer is not None, "no agent"
        return answer

    def readyz(self) -> tuple[int, str]:
        """Status code and text."""
        url = f"http://127.0.0.1:{self.admin_port}/readyz"
        command = ["curl", "-sS", "--max-time", "5", "-w", "%{http_code}", url]
        out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
        return int(out[-3:]), out[:-3]

    def log(self) -> str:
        return self.agent_log.read_text()

    def until_logged(self, text: str, begin: int = 0) -> None:
        """`begin`: how much of the log is old."""
        until(lambda: text in self.log()[begin:], f"{text!r} in the agent's log")

    def stop_agent(self, number: signal.Signals = signal.SIGTERM) -> int:
        assert self.agent is not None
        self.agent.send_signal(number)
        return self.agent.wait(SECONDS)

    # --- the other side ------------------------------------------------------------------------------------------

    def endpoint(self, name: str, address: str = "127.0.0.1", port: int = 0, netns: str | None = None) -> int:
        """Start an HTTP endpoint outside the mesh; its port."""
        command = [sys.executable, "-m", "tests.support.server", name, address, str(port)]
        return int(self.start([*self._in(netns), *command], stdout=subprocess.PIPE, text=True).stdout.readline())

    def quick(self, name: str, address: str = "127.0.0.1", port: int = 0, netns: str | None = None) -> int:
        """Start an endpoint that bears load; its port."""
        command = [sys.executable, "-m", "tests.support.quick", name, address, str(port)]
        return int(self.start([*self._in(netns), *command], stdout=subprocess.PIPE, text=True).stdout.readline())

    def load(
        self, host: str, *, rate: float = 0, connections: int = 4, new: bool = False, netns: str | None = None
    ) -> Load:
        """A client that asks port 80 all the time; returns once each connection has had an answer."""
        command = [sys.executable, "-m", "tests.support.load", host, "80", str(connections), str(rate)]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        return Load(self.start_client(*command, "new" if new else "kept", netns=netns, **pipes))

    @property
    def latest(self) -> subprocess.Popen[Any]:
        """What was started last."""
        return self._processes[-1]

    def start(self, command: Sequence[str], **options: Any) -> subprocess.Popen[Any]:
        process = subprocess.Popen(command, cwd=ROOT, **options)
        self._processes.append(process)
        return process

    def _in(self, netns: str | None) -> list[str]:
        return ["ip", "netns", "exec", netns] if netns else []

    def _joined(self, command: Sequence[str], cgroup: Path | None) -> list[str]:
        """The command, run from inside `cgroup` (None: from where we are)."""
        if cgroup is None:
            return list(command)
        return ["sh", "-c", 'echo $$ > "$0" && exec "$@"', str(cgroup / "cgroup.procs"), *command]

    def client(self, *command: str, netns: str | None = None, timeout: float = SECONDS) -> Done:
        """Run a command as an application of the mesh."""
        whole = self._joined([*self._in(netns), *command], self.cgroup)
        return subprocess.run(whole, capture_output=True, text=True, check=False, timeout=timeout, cwd=ROOT)

    def start_client(self, *command: str, netns: str | None = None, **options: Any) -> subprocess.Popen[Any]:
        return self.start(self._joined([*self._in(netns), *command], self.cgroup), **options)

    def curl(self, url: str, *more: str, netns: str | None = None) -> dict[str, Any]:
        """What an endpoint of ours answers to curl."""
        done = self.client("curl", "-sS", "--fail-with-body", "--max-time", "10", *more, url, netns=netns)
        assert done.returncode == 0, (done.stdout, done.stderr)
        value: dict[str, Any] = json.loads(done.stdout)
        return value

    def network(self, count: int) -> list[str]:
        """Network namespaces that reach each other: the n-th has 198.18.0.n, over a bridge in one more namespace."""
        hub = self.netns(f"{self.instance.name}-hub")
        names = [self.netns(f"{self.instance.name}-{number}") for number in range(1, count + 1)]
        plumbing.join(hub, {name: f"198.18.0.{number}" for number, name in enumerate(names, 1)}, 24)
        return names

    def netns(self, name: str) -> str:
        """A network namespace with its loopback up."""
        plumbing.create(name)
        self._namespaces.append(name)
        return name

    def records(self, count: int) -> list[dict[str, Any]]:
        """The access log, once it has at least `count` lines."""

        def lines() -> list[str]:
            text = self.access_log.read_text() if self.access_log.exists() else ""
            whole = text.splitlines()
            return whole if len(whole) >= count else []

        return [json.loads(line) for line in until(lines, f"{count} access log lines")]

    def remove_netns(self, name: str) -> None:
        plumbing.remove(name)
        self._namespaces.remove(name)


def service(
    name: str, address: str, ports: Sequence[int], protocol: str = "http", port: int = 80, **spec: Any
) -> dict[str, Any]:
    """A Service document with loopback endpoints on `ports`."""
    return {
        "apiVersion": "meshbpf.io/v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "addresses": [address],
            "ports": [{"name": "main", "port": port, "protocol": protocol}],
            "endpoints": [{"address": "127.0.0.1", "ports": {"main": number}} for number in ports],
            **spec,
        },
    }


def policy(service_name: str, **spec: Any) -> dict[str, Any]:
    return {
        "apiVersion": "meshbpf.io/v1",
        "kind": "ServicePolicy",
        "metadata": {"name": service_name},
        "spec": {"service": service_name, **spec},
    }


def which(program: str) -> str:
    found = shutil.which(program)
    assert found is not None, f"{program} is missing: vagrant/provision.sh test"
    return found
