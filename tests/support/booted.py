"""A systemd of its own for tests: the machine's own files under an overlay, in new mount, pid, network and cgroup
namespaces. Units, sandboxing and restarts are real; what it writes, mounts and pins is gone with it.

The tree is at /opt/meshbpf inside, with a `.venv/bin/meshbpf` as `make setup` makes one, and this Python at
/opt/python: wherever they lie outside, also under a /tmp that the unit's PrivateTmp hides.
"""

from __future__ import annotations

import itertools
import json
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from loader import environment
from tests.support.ground import Ground
from tests.support.machine import ROOT, Done, Load, until

INIT = "/lib/systemd/systemd"
PYTHON = f"/opt/python/{Path(sys.executable).relative_to(sys.prefix)}"
# What a machine's boot would do to the kernel that we share, or wait for in vain.
MASKED = (
    "systemd-sysctl.service", "systemd-modules-load.service", "systemd-remount-fs.service", "systemd-udevd.service",
    "systemd-tmpfiles-setup.service", "systemd-tmpfiles-clean.timer",
    "systemd-random-seed.service", "systemd-update-utmp.service", "systemd-machine-id-commit.service",
    "dev-hugepages.mount", "dev-mqueue.mount", "sys-kernel-debug.mount", "sys-kernel-tracing.mount",
    "sys-fs-fuse-connections.mount", "proc-sys-fs-binfmt_misc.automount",
)  # fmt: skip
INSIDE = """
set -e
new={folder}/new; root=$new/root
mount --make-rprivate /
mount -t tmpfs tmpfs "$new"
mkdir "$new"/upper "$new"/work "$new"/tree "$new"/treework "$root"
mount -t overlay overlay -o "lowerdir=/,upperdir=$new/upper,workdir=$new/work" "$root"
mount -t proc proc "$root/proc"
mount -o bind,ro /proc/sys "$root/proc/sys"
mount -t sysfs sysfs "$root/sys"
mount -t cgroup2 cgroup2 "$root/sys/fs/cgroup"
mount -t bpf -o mode=0700 bpf "$root/sys/fs/bpf"
for folder in run tmp dev; do mount -t tmpfs tmpfs "$root/$folder"; done
for name in null zero full random urandom tty; do
	touch "$root/dev/$name"; mount --bind "/dev/$name" "$root/dev/$name"
done
mkdir "$root/dev/pts" "$root/dev/shm"
mount -t devpts -o newinstance,ptmxmode=666 devpts "$root/dev/pts"
ln -s pts/ptmx "$root/dev/ptmx"; ln -s /proc/self/fd/1 "$root/dev/stdout"
mkdir -p "$root/opt/meshbpf" "$root/opt/python" "$root{tree}" "$root{folder}"
mount --bind {tree} "$root{tree}"
mount --bind {prefix} "$root/opt/python"
mount --bind {folder} "$root{folder}"
mount -t overlay overlay -o "lowerdir={tree},upperdir=$new/tree,workdir=$new/treework" "$root/opt/meshbpf"
mkdir -p "$root/opt/meshbpf/.venv/bin"
install -m 755 {folder}/meshbpf "$root/opt/meshbpf/.venv/bin/meshbpf"
rm -rf "$root/etc/systemd/system" "$root/etc/meshbpf" "$root/etc/default/meshbpf" "$root/var/lib/meshbpf"
mkdir "$root/etc/systemd/system" "$root/etc/meshbpf"
for unit in {masked}; do ln -s /dev/null "$root/etc/systemd/system/$unit"; done
ip link set lo up
mkdir -p "$root/old"; cd "$root"; pivot_root . old; umount -l /old
exec env -i container=meshbpf-test PATH=/usr/sbin:/usr/bin:/sbin:/bin {init} --unit=basic.target --show-status=no \\
	--log-target=journal
"""
_numbers = itertools.count()


class Booted:
    """Use as a context manager. Commands run inside with `run`, members of a slice with `load`."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.cgroup = environment.cgroup2() / f"mt-{os.getpid()}-systemd-{next(_numbers)}"
        self._manager = 0
        self._outside: subprocess.Popen[bytes] | None = None
        self._processes: list[subprocess.Popen[Any]] = []

    def __enter__(self) -> Booted:
        self.cgroup.mkdir()
        (self.folder / "new").mkdir()
        script = f'#!/bin/sh\nexport PYTHONPATH=/opt/meshbpf\nexec {PYTHON} -P -m meshbpf.cli "$@"\n'
        (self.folder / "meshbpf").write_text(script)
        words = {"folder": self.folder, "tree": ROOT, "prefix": sys.prefix, "init": INIT, "masked": " ".join(MASKED)}
        script = INSIDE.format(**words)
        join = f"echo $$ > {self.cgroup}/cgroup.procs"
        isolate = "exec unshare --mount --pid --net --cgroup --uts --ipc --fork --kill-child"
        self._outside = subprocess.Popen(["sh", "-c", f"{join}; {isolate} sh -c {shlex.quote(script)}"])
        try:
            self._manager = until(self._first, "a first process inside")
            until(
                lambda: self.run("systemctl", "is-system-running").stdout.strip() in ("running", "degraded"), "a boot"
            )
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *exc: object) -> None:
        for process in self._processes:
            if process.poll() is None:
                process.kill()
            process.wait()
            for stream in (process.stdin, process.stdout):
                if stream is not None:
                    stream.close()
        assert self._outside is not None
        self._outside.send_signal(signal.SIGKILL)  # its child, the manager, dies with it, and with that all inside
        self._outside.wait()
        Ground.remove(self.cgroup)

    def _first(self) -> int:
        assert self._outside is not None and self._outside.poll() is None
        children = Path(f"/proc/{self._outside.pid}/task/{self._outside.pid}/children").read_text().split()
        there = bool(children) and Path(f"/proc/{children[0]}/comm").read_text() == "systemd\n"
        return int(children[0]) if there else 0

    def journal(self, *more: str) -> str:
        return self.run("journalctl", "--no-pager", "-o", "cat", *more).stdout

    def _within(self, command: Sequence[str], slice_: str = "") -> list[str]:
        """The command, inside; with `slice_` as a member of that cgroup."""
        enter = ["nsenter", "--target", str(self._manager), "--mount", "--pid", "--net", "--cgroup", "--uts", "--ipc"]
        if not slice_:
            return [*enter, *command]
        join = f'mkdir -p {slice_}/test && echo 0 > {slice_}/test/cgroup.procs && exec "$@"'
        return [*enter, "sh", "-c", f"cd /sys/fs/cgroup && {join}", "-", *command]

    def run(self, *command: str, slice_: str = "", check: bool = False) -> Done:
        done = subprocess.run(
            self._within(command, slice_), capture_output=True, text=True, check=False, timeout=60, env=self._env()
        )
        assert done.returncode == 0 or not check, (command, done.stdout, done.stderr, self.journal()[-4000:])
        return done

    def start(self, *command: str, slice_: str = "") -> subprocess.Popen[str]:
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        process = subprocess.Popen(self._within(command, slice_), text=True, env=self._env(), **pipes)
        self._processes.append(process)
        return process

    @staticmethod
    def _env() -> dict[str, str]:
        return {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "PYTHONPATH": "/opt/meshbpf", "LANG": "C.UTF-8"}

    def endpoint(self, name: str) -> int:
        """Start an endpoint that bears load, outside of every slice; its port."""
        process = self.start(PYTHON, "-m", "tests.support.quick", name)
        assert process.stdout is not None
        return int(process.stdout.readline())

    def load(self, host: str, *, new: bool, rate: float = 200, connections: int = 4) -> Load:
        """Requests to port 80, paced, by a member of mesh.slice."""
        kind = "new" if new else "kept"
        words = ("-m", "tests.support.load", host, "80", str(connections), str(rate), kind)
        return Load(self.start(PYTHON, *words, slice_="mesh.slice"))

    def write(self, path: str, text: str) -> None:
        staged = self.folder / "staged"
        staged.write_text(text)
        self.run("install", "-D", "-m", "644", str(staged), path, check=True)

    def unit(self, name: str) -> dict[str, str]:
        """What systemd says of a unit."""
        out = self.run("systemctl", "show", name, check=True).stdout
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def meshbpf(self, *arguments: str) -> Done:
        return self.run("/opt/meshbpf/.venv/bin/meshbpf", *arguments)

    def show(self, *arguments: str) -> dict[str, Any]:
        done = self.meshbpf(*arguments, "-o", "json")
        assert done.returncode == 0, done.stderr
        value: dict[str, Any] = json.loads(done.stdout)
        return value
