"""deploy/image built from Debian and run for real: attach, a direct call, run, a proxied call, detach; privileged as
the Kubernetes base runs it, and confined as the least-privilege overlay does.

Containers have this machine's network namespace, cgroups and processes, but a bpffs and a run directory of the test's.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader import environment
from tests.support import kustomize
from tests.support.machine import ROOT, Done, Machine, policy, service, until

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]
NAME = "localhost/meshbpf:test"
GOVERNED, DIRECT = "127.96.0.10", "127.96.0.11"
BUILD_SECONDS = 800
# A machine that holds CAP_SYS_RESOURCE back may only lower limits; making cgroups is not podman's part here.
SANDBOXED = ("--cgroups=disabled", "--ulimit=nofile=4096:4096", "--ulimit=nproc=4096:4096")
_numbers = itertools.count()


class Podman:
    """A store of its own, in a mount namespace with a bpffs, a /run and a store directory of its own."""

    def __init__(self, folder: Path) -> None:
        if shutil.which("podman") is None or shutil.which("debootstrap") is None:
            why = "podman or debootstrap is missing: vagrant/provision.sh image"
            (pytest.fail if os.environ.get("MESHBPF_NO_SKIP") else pytest.skip)(why)
        self.folder = folder
        self.command = f"podman --root {folder}/store --runroot {folder}/run --cgroup-manager cgroupfs"
        mounts = "mount -t bpf -o mode=0700 bpf /sys/fs/bpf && mount -t tmpfs tmpfs /run && mkdir /run/meshbpf"
        cgroup = (
            "umount -R /sys/fs/cgroup && mount -t cgroup2 cgroup2 /sys/fs/cgroup"  # crun refuses version 1 beside 2
        )
        stay = f"mount --make-rprivate / && {mounts} && {cgroup} && echo ready && exec cat"
        self._holder = subprocess.Popen(
            ["unshare", "--mount", "sh", "-c", stay], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        assert self._holder.stdout is not None
        assert self._holder.stdout.readline() == "ready\n"

    def within(self, *command: str) -> list[str]:
        return ["nsenter", "--target", str(self._holder.pid), "--mount", *command]

    def run(self, *command: str, seconds: float = 60, **more: str) -> Done:
        done = subprocess.run(
            self.within(*command),
            capture_output=True,
            text=True,
            check=False,
            timeout=seconds,
            env={**os.environ, **more},
        )
        return done

    def build(self) -> None:
        done = self.run(str(ROOT / "deploy/image/build.sh"), NAME, seconds=BUILD_SECONDS, PODMAN=self.command)
        assert done.returncode == 0, (done.stdout[-4000:], done.stderr[-4000:])

    def container(self, name: str, config: Path, options: list[str], *arguments: str) -> list[str]:
        """The command line that runs `meshbpf ARGUMENTS` in a container."""
        hosts = [
            f"--volume={path}:{path}" for path in ("/sys/fs/bpf", "/sys/fs/cgroup", "/run/meshbpf", str(config.parent))
        ]
        ours = ["--rm", f"--name={name}", "--network=host", "--cgroupns=host", *SANDBOXED, *hosts]
        ours += [f"--volume={config}:/etc/meshbpf:ro", *options]
        return self.within(*self.command.split(), "run", *ours, NAME, *arguments)

    def close(self) -> None:
        self.run(*self.command.split(), "system", "reset", "--force", seconds=120)
        assert self._holder.stdin is not None
        self._holder.communicate()


@pytest.fixture(scope="module")
def podman(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Podman]:
    made = Podman(tmp_path_factory.mktemp("podman"))
    try:
        made.build()
        yield made
    finally:
        made.close()


def confined() -> list[str]:
    """podman's words for the overlay's securityContext; capabilities that this machine itself has not are left out."""
    (agent,) = kustomize.containers(kustomize.build(ROOT / "deploy/kubernetes/overlays/least-privilege"))
    security = agent["securityContext"]
    status = Path("/proc/self/status").read_text().splitlines()
    bounding = int(next(line.split()[1] for line in status if line.startswith("CapBnd")), 16)
    bits = {name: bit for bit, name in environment.CAPABILITIES.items()} | {"CAP_SYS_RESOURCE": 24}
    names = security["capabilities"]["add"]
    added = [f"--cap-add={name}" for name in names if bounding >> bits[f"CAP_{name}"] & 1]
    assert security["readOnlyRootFilesystem"] and not security["allowPrivilegeEscalation"]
    assert security["seccompProfile"] == security["appArmorProfile"] == {"type": "Unconfined"}
    added += [f"--security-opt={kind}=unconfined" for kind in ("seccomp", "apparmor")]
    flags = ["--read-only", "--security-opt=no-new-privileges", "--tmpfs=/tmp", "--tmpfs=/var/lib/meshbpf"]
    return ["--cap-drop=all", *added, *flags]


@pytest.mark.parametrize("variant", ["privileged", "confined"])
def test_one_life_in_the_image(machine: Machine, podman: Podman, variant: str) -> None:
    options = confined() if variant == "confined" else ["--privileged"]
    port = machine.endpoint("a")
    config = machine.configure(
        service("orders", GOVERNED, [port]), service("ledger", DIRECT, [port]), policy("ledger", mode="direct")
    ).parent

    def meshbpf(*arguments: str) -> list[str]:
        name = f"{machine.instance.name}-{next(_numbers)}"
        return podman.container(name, config, options, *arguments, "--instance", machine.instance.name)

    attached = subprocess.run(
        meshbpf("attach", "--cgroup", machine.cgroup.name), capture_output=True, text=True, check=False, timeout=120
    )
    assert attached.returncode == 0, attached.stderr
    assert machine.curl(f"http://{DIRECT}/")["endpoint"] == "a"
    with machine.agent_log.open("ab") as log:
        agent = machine.start(meshbpf("run", "--cgroup", machine.cgroup.name), stdout=log, stderr=log)

    def ready() -> bool:
        assert agent.poll() is None, machine.log()
        return " ready instance=" in machine.log()

    until(ready, "the agent in its container", 60.0)
    assert machine.readyz()[0] == 200
    seen = machine.curl(f"http://{GOVERNED}/hello")
    assert seen["endpoint"] == "a" and "x-request-id" in {name.lower() for name in seen["headers"]}
    (record,) = machine.records(1)
    assert (record["service"], record["response_code"], record["carrier"]) == ("orders", 200, "proxy")
    # A container's processes end with it, and not by detach, which is in another one and may not see them.
    agent.terminate()
    assert agent.wait(60) == 0, machine.log()
    detached = subprocess.run(meshbpf("detach"), capture_output=True, text=True, check=False, timeout=120)
    assert detached.returncode == 0 and "detached" in detached.stdout, detached.stderr
    assert podman.run("find", "/sys/fs/bpf", "/run/meshbpf", "-name", f"{machine.instance.name}*").stdout == ""
    assert machine.client("curl", "-sS", "--max-time", "5", f"http://{DIRECT}/").returncode == 7


def test_the_image_holds_what_runs_and_no_more(podman: Podman) -> None:
    done = podman.run(*podman.command.split(), "run", "--rm", *SANDBOXED, "--network=host", NAME, "version")
    assert done.returncode == 0 and "meshbpf" in done.stdout, done.stderr
    look = "ls -a /opt/meshbpf; find /opt/meshbpf -name __pycache__ -path '*/opt/meshbpf/loader/*'; which gcc git pip"
    words = ("run", "--rm", *SANDBOXED, "--network=host", "--entrypoint=sh", NAME, "-c", look)
    found = set(podman.run(*podman.command.split(), *words).stdout.split())
    expected = {".", "..", ".venv", "README.md", "bpf", "loader", "meshbpf", "pyproject.toml"}
    assert found - {"/opt/meshbpf/.venv/bin/pip"} == expected | {"userspace_proxy", "vagrant"}
