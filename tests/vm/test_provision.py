"""provision.sh on made-up machines: `dpkg-query`, `apt-get` and `id` are scripts of the test, nothing is installed."""

import os
import subprocess
from pathlib import Path

import pytest

PROVISION = Path(__file__).resolve().parents[2] / "vagrant" / "provision.sh"
POLICY = Path("/usr/sbin/policy-rc.d")


class Machine:
    """A PATH in front of the real one. `installed` is what dpkg knows; apt-get appends what it is asked for."""

    def __init__(self, root: Path, installed: str = "", uid: int = 0, works: bool = True) -> None:
        self.calls = root / "calls"
        (root / "installed").write_text(installed)
        self.command(root, "id", f"echo {uid}")
        self.command(root, "dpkg-query", f'grep -qx "$4" {root}/installed && printf installed || exit 1')
        grow = f"printf '%s\\n' \"$@\" >>{root}/installed" if works else ":"
        self.command(root, "apt-get", f'echo "$@" >>{self.calls}; test -x {POLICY} && echo held >>{self.calls}; {grow}')
        self.env = {**os.environ, "PATH": f"{root}:/usr/bin:/bin"}

    @staticmethod
    def command(root: Path, name: str, body: str) -> None:
        (root / name).write_text(f"#!/bin/sh\n{body}\n")
        (root / name).chmod(0o755)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [PROVISION, *arguments], env=self.env, capture_output=True, text=True, check=False, timeout=30
        )


def packages(group: str) -> list[str]:
    return subprocess.run([PROVISION, "list", group], capture_output=True, text=True, check=True).stdout.split()


@pytest.mark.parametrize("group", ["run", "test", "bench", "image", "vm"])
def test_lists_each_group_as_plain_package_names(group: str) -> None:
    listed = packages(group)
    assert listed
    assert not [name for name in listed if "=" in name]


def test_calls_no_apt_when_all_is_there_even_without_root(tmp_path: Path) -> None:
    machine = Machine(tmp_path, installed="\n".join(packages("run")), uid=1000)
    assert machine.run("run").returncode == 0
    assert not machine.calls.exists()


def test_without_root_names_the_packages_and_the_remedy(tmp_path: Path) -> None:
    answer = Machine(tmp_path, uid=1000).run("run")
    assert answer.returncode == 69
    assert "python3-bpfcc" in answer.stderr
    assert "sudo" in answer.stderr


@pytest.mark.skipif(os.getuid() != 0, reason="holding services back writes policy-rc.d: needs root")
def test_installs_only_what_is_missing_and_holds_services_back(tmp_path: Path) -> None:
    before = POLICY.read_bytes() if POLICY.exists() else None
    there, missing = packages("run")[:-1], packages("run")[-1]
    machine = Machine(tmp_path, installed="\n".join(there) + "\n")
    answer = machine.run("run")
    assert answer.returncode == 0, answer.stderr
    calls = machine.calls.read_text().splitlines()
    assert [line.split()[-1] for line in calls if " install " in line] == [missing]
    assert "held" in calls
    assert (POLICY.read_bytes() if POLICY.exists() else None) == before


@pytest.mark.skipif(os.getuid() != 0, reason="holding services back writes policy-rc.d: needs root")
def test_says_what_apt_could_not_bring(tmp_path: Path) -> None:
    answer = Machine(tmp_path, works=False).run("run")
    assert answer.returncode == 69
    assert "still missing" in answer.stderr


@pytest.mark.parametrize("arguments", [(), ("nope",), ("list",), ("list", "nope"), ("run", "nope")])
def test_refuses_unknown_groups(arguments: tuple[str, ...], tmp_path: Path) -> None:
    assert Machine(tmp_path).run(*arguments).returncode == 2
