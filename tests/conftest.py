"""Fixtures for every kind of test; what needs the kernel is skipped with its reason, or fails under MESHBPF_NO_SKIP."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader import environment
from meshbpf.errors import MeshError
from tests.support.machine import Machine

KERNEL_FOLDERS = ("kernel", "e2e")
PROGRAMS = ("bpftool", "curl", "ip", "wrk", "tcpdump")


def lack() -> str:
    """Why this machine cannot run the kernel tests; empty when it can."""
    if os.geteuid() != 0:
        return "needs root"
    missing = [program for program in PROGRAMS if shutil.which(program) is None]
    if missing:
        return f"missing: {', '.join(missing)} (vagrant/provision.sh test)"
    try:
        environment.require_capabilities()
        environment.cgroup2()
        environment.require_bpffs()
    except MeshError as error:
        return str(error)
    if not Path("/usr/lib/python3/dist-packages/bcc").is_dir():
        return "missing: python3-bpfcc (vagrant/provision.sh run)"
    return ""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    kernel = [item for item in items if item.path.parent.name in KERNEL_FOLDERS]
    for item in kernel:
        item.add_marker(pytest.mark.kernel)
    if kernel and (why := lack()) and not os.environ.get("MESHBPF_NO_SKIP"):
        for item in kernel:
            item.add_marker(pytest.mark.skip(reason=why))


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    """A mesh machine of its own, named after the process and test, so that two runs do not meet."""
    with Machine(tmp_path, f"mt-{os.getpid()}-{tmp_path.name[-12:].strip('-_').replace('_', '-').lower()}") as made:
        yield made
