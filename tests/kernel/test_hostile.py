"""What others may lay in our way while we are root: files in the working directory, folders where we pin."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kernel.test_attach import CONFIG
from tests.support.ground import Ground
from tests.support.machine import ROOT

CLI = (sys.executable, "-P", "-m", "meshbpf.cli")  # as the installed command: nothing of the working directory's


@pytest.fixture
def ground() -> Iterator[Ground]:
    with Ground(f"hostile-{os.getpid()}") as made:
        yield made


def cli(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.run(
        [*CLI, *arguments], capture_output=True, text=True, check=False, timeout=90, cwd=folder, env=environment
    )


@pytest.mark.parametrize("command", ["attach", "check"])
def test_root_runs_nothing_from_the_working_directory(ground: Ground, tmp_path: Path, command: str) -> None:
    for name in ("json", "loader", "meshbpf", "bcc"):
        (tmp_path / f"{name}.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'a').write({name!r})\n")
    (tmp_path / "mesh.yaml").write_text(CONFIG)
    more = {
        "attach": ("--cgroup", str(ground.cgroup), "-c", "mesh.yaml", "--instance", ground.instance.name),
        "check": ("--pre",),
    }
    done = cli(tmp_path, command, *more[command])
    assert done.returncode == 0, (done.stdout, done.stderr)
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_every_child_of_ours_starts_like_that() -> None:
    for path in [*(ROOT / "loader").rglob("*.py"), *(ROOT / "meshbpf").rglob("*.py")]:
        assert not re.search(r'(sys\.executable|python3"),\s*"-[mc]"', path.read_text()), path
