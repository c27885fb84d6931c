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
    assert ("attached" if command == "attach" else "bcc") in done.stdout, (done.stdout, done.stderr)
    assert not (tmp_path / "ran").exists(), (tmp_path / "ran").read_text()


def test_every_child_of_ours_starts_like_that() -> None:
    for path in [*(ROOT / "loader").rglob("*.py"), *(ROOT / "meshbpf").rglob("*.py")]:
        assert not re.search(r'(sys\.executable|python3"),\s*"-[mc]"', path.read_text()), path


@pytest.mark.parametrize("which", ["top", "instance"])
@pytest.mark.parametrize(
    ("laid", "said"),
    [
        ("mkdir -m 700 $0; chown 65534 $0", r"belongs to nobody \(uid 65534\), not to root \(uid 0\)"),
        ("mkdir -m 770 $0", r"is open to others than root \(uid 0\) \(mode 770\)"),
        ("mkdir -m 700 /sys/fs/bpf/there; ln -s /sys/fs/bpf/there $0", "is no directory"),
    ],
)
def test_pins_only_where_nobody_else_may_write(
    ground: Ground, tmp_path: Path, which: str, laid: str, said: str
) -> None:
    """In a mount namespace of its own, with a bpffs for everybody."""
    (tmp_path / "mesh.yaml").write_text(CONFIG)
    top = Path("/sys/fs/bpf/meshbpf")
    folder = top if which == "top" else top / ground.instance.name
    begin = "mount -t bpf -o mode=1777 bpf /sys/fs/bpf && "
    begin += "" if which == "top" else f"mkdir -m 700 {top} && "
    script = f'{begin}{{ {laid}; }} && exec "$@"'
    command = ["attach", "--cgroup", str(ground.cgroup), "-c", "mesh.yaml", "--instance", ground.instance.name]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(folder), *CLI, *command],
        capture_output=True, text=True, check=False, timeout=60, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 69, (done.stdout, done.stderr)
    assert re.search(f"{folder} {said}", done.stderr), done.stderr
    assert f"rm -r {folder}" in done.stderr


def test_a_detach_does_not_follow_a_link_out_of_our_folder(ground: Ground, tmp_path: Path) -> None:
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "theirs").touch()
    top = Path("/sys/fs/bpf/meshbpf")
    script = f'mount -t bpf bpf /sys/fs/bpf && mkdir -m 700 {top} && ln -s {tmp_path} $0 && exec "$@"'
    command = ["detach", "--instance", ground.instance.name]
    done = subprocess.run(
        ["unshare", "--mount", "--propagation", "private", "sh", "-c", script, str(top / ground.instance.name),
         *CLI, *command],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 69, (done.stdout, done.stderr)
    assert (tmp_path / "links" / "theirs").exists()
