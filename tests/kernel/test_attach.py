"""Attaching where and again: several cgroups, fewer, one made anew, other instances, wrong places, missing means."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader import abi, dataplane, environment
from loader.instance import Instance
from meshbpf.errors import Busy
from meshbpf.model import MapSizes
from tests.support import bpftool
from tests.support.ground import SIZES, Ground, Listener, mesh, reached, service, untouched
from tests.support.machine import CLI, ROOT

ADDRESS, OTHER = "127.96.4.1", "127.96.4.2"
ATTACH_SECONDS = 2.0
CONFIG = """\
apiVersion: meshbpf.io/v1
kind: Service
metadata: {name: orders}
spec:
  addresses: [127.96.4.1]
  ports: [{name: main, port: 80, protocol: tcp}]
  endpoints: [{address: 127.0.0.1, ports: {main: 9}}]
"""


@pytest.fixture
def ground() -> Iterator[Ground]:
    with Ground(f"attach-{os.getpid()}") as made:
        yield made


@pytest.fixture
def beside() -> Iterator[Ground]:
    with Ground(f"beside-{os.getpid()}") as made:
        yield made


@pytest.fixture
def a() -> Iterator[Listener]:
    with Listener() as made:
        yield made


@pytest.fixture
def b() -> Iterator[Listener]:
    with Listener() as made:
        yield made


@pytest.fixture
def config(tmp_path: Path) -> Path:
    path = tmp_path / "mesh.yaml"
    path.write_text(CONFIG)
    return path


def links(ground: Ground) -> set[str]:
    return {pin.name for pin in ground.instance.links.iterdir()}


def dials(ground: Ground, address: str, *listeners: Listener, cgroup: Path | None = None) -> Listener | None:
    """Who serves a call to the address; None: nobody, it was refused."""
    with ground.client(cgroup=cgroup) as sock:
        try:
            sock.connect((address, 80))
        except ConnectionRefusedError:
            assert untouched(*listeners)
            return None
        return reached(*listeners)


def test_a_second_attach_is_quick_and_changes_nothing(ground: Ground, a: Listener) -> None:
    wanted = mesh(service("orders", ADDRESS, a.endpoint()))
    ground.attach(wanted)
    assert dials(ground, ADDRESS, a) is a
    before = bpftool.pinned(ground.instance).ids, links(ground), ground.counts(ADDRESS)
    begin = time.monotonic()
    ground.attach(wanted)
    assert time.monotonic() - begin < ATTACH_SECONDS
    after = bpftool.pinned(ground.instance).ids, links(ground), ground.counts(ADDRESS)
    assert after[1:] == before[1:]
    for kind in ("link", "map"):
        assert after[0][kind] == before[0][kind], kind
    assert not after[0]["prog"] & before[0]["prog"], "the programs are new"
    assert dials(ground, ADDRESS, a) is a


def test_a_kernel_that_tells_nothing_of_its_structures_leads_without_redirect(
    ground: Ground, a: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    lack = "this kernel has no BTF at /sys/kernel/btf/vmlinux"
    monkeypatch.setattr("loader.attach._redirect_defines", lambda: ({}, lack))
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
    assert dials(ground, ADDRESS, a) is a
    assert ground.instance.read_state()["redirectLack"] == lack


def test_attach_again_with_other_services(ground: Ground, a: Listener, b: Listener) -> None:
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
    ground.attach(mesh(service("orders", ADDRESS, b.endpoint()), service("users", OTHER, a.endpoint())))
    assert dials(ground, ADDRESS, a, b) is b
    assert dials(ground, OTHER, a, b) is a
    ground.attach(mesh(service("users", OTHER, a.endpoint())))
    assert dials(ground, ADDRESS, a, b) is None


def test_attach_again_with_other_sizes_makes_new_tables(ground: Ground, a: Listener) -> None:
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
    old = bpftool.pinned(ground.instance)
    old_links = links(ground)
    with ground.connect(ADDRESS) as sock, a.accept() as accepted:
        larger = MapSizes(services=512, slots=512, endpoints=512, policies=512, flows=512, members=64)
        ground.attach(mesh(service("orders", ADDRESS, a.endpoint()), sizes=larger))
        sock.sendall(b"still here")
        assert accepted.recv(100) == b"still here"
    assert [folder.name for folder in ground.instance.pins.glob("maps-*")] == [ground.plane.maps_folder.name]
    shown = bpftool.ask("map", "show", "pinned", str(ground.plane.maps_folder / "services"))
    assert shown["max_entries"] == 512
    assert links(ground) == old_links
    assert dials(ground, ADDRESS, a) is a
    new = bpftool.pinned(ground.instance).ids["map"]
    bpftool.Objects({"link": frozenset(), "prog": old.ids["prog"], "map": old.ids["map"] - new}).gone()


def test_several_cgroups_then_one_less(ground: Ground, a: Listener) -> None:
    first, second = ground.child("first"), ground.child("second")
    wanted = mesh(service("orders", ADDRESS, a.endpoint()))
    ground.attach(wanted, first, second)
    assert dials(ground, ADDRESS, a, cgroup=first) is a
    assert dials(ground, ADDRESS, a, cgroup=second) is a
    assert dials(ground, ADDRESS, a, cgroup=ground.cgroup) is None
    ground.attach(wanted, second)
    assert dials(ground, ADDRESS, a, cgroup=first) is None
    assert dials(ground, ADDRESS, a, cgroup=second) is a
    assert bpftool.hooks_on(first) == []
    assert len(links(ground)) == len(dataplane.CGROUP_HOOKS)


def test_a_cgroup_removed_and_made_anew(ground: Ground, a: Listener) -> None:
    wanted = mesh(service("orders", ADDRESS, a.endpoint()))
    child = ground.child("child")
    ground.attach(wanted, child)
    before = links(ground)
    child.rmdir()
    child.mkdir()
    assert dials(ground, ADDRESS, a, cgroup=child) is None
    ground.attach(wanted, child)
    assert dials(ground, ADDRESS, a, cgroup=child) is a
    assert not links(ground) & before
    assert len(links(ground)) == len(dataplane.CGROUP_HOOKS)


def test_detach_after_the_cgroup_is_gone(ground: Ground) -> None:
    child = ground.child("child")
    ground.attach(mesh(service("orders", ADDRESS)), child)
    ours = bpftool.pinned(ground.instance)
    child.rmdir()
    dataplane.detach(ground.instance)
    assert ours.gone()


def test_a_cgroup_and_its_child_of_one_instance_count_once(ground: Ground, a: Listener) -> None:
    child = ground.child("child")
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint())), ground.cgroup, child)
    for _ in range(5):
        assert dials(ground, ADDRESS, a, cgroup=child) is a
    opened, _, closed, _ = ground.counts(ADDRESS)
    assert (opened, closed) == (5, 5)
    assert ground.reasons()["direct"] == 5


def test_two_instances_on_two_cgroups(ground: Ground, beside: Ground, a: Listener, b: Listener) -> None:
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
    beside.attach(mesh(service("orders", ADDRESS, b.endpoint())))
    assert dials(ground, ADDRESS, a, b) is a
    assert dials(beside, ADDRESS, a, b) is b
    dataplane.detach(ground.instance)
    assert dials(ground, ADDRESS, a, b) is None
    assert dials(beside, ADDRESS, a, b) is b
    assert Instance(beside.instance.name).pins.is_dir()


def test_two_instances_on_one_cgroup(ground: Ground, beside: Ground, a: Listener, b: Listener) -> None:
    """The second is told who is there; the first goes on."""
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint())))
    with pytest.raises(Busy, match=f"led by instance {ground.instance.name}"):
        beside.attach(mesh(service("orders", ADDRESS, b.endpoint())), ground.cgroup)
    assert not beside.instance.pins.exists()
    assert dials(ground, ADDRESS, a, b) is a


def test_nested_instances(ground: Ground, beside: Ground, a: Listener, b: Listener) -> None:
    """The inner one leads what it knows, the outer one the rest; each counts and names its own."""
    inner = ground.child("inner")
    ground.attach(mesh(service("orders", ADDRESS, a.endpoint()), service("users", OTHER, a.endpoint())))
    beside.attach(mesh(service("orders", ADDRESS, b.endpoint())), inner)
    assert dials(ground, ADDRESS, a, b, cgroup=inner) is b
    assert dials(ground, OTHER, a, b, cgroup=inner) is a
    assert dials(ground, ADDRESS, a, b) is a
    with ground.client(cgroup=inner) as sock:
        sock.connect((OTHER, 80))
        assert sock.getpeername() == (OTHER, 80)
        reached(a, b)
    assert beside.counts(ADDRESS)[0] == 1
    assert ground.counts(ADDRESS)[0] == 1
    dataplane.detach(beside.instance)
    assert dials(ground, ADDRESS, a, b, cgroup=inner) is a


def test_detach_twice(ground: Ground, config: Path) -> None:
    ground.attach(mesh(service("orders", ADDRESS)))
    for expected in ("removed link", "nothing attached"):
        done = cli("detach", "--instance", ground.instance.name)
        assert done.returncode == 0, done.stderr
        assert expected in done.stdout


# --- what this machine lacks -------------------------------------------------------------------------------------


def cli(*arguments: str, before: tuple[str, ...] = ()) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*before, *CLI, *arguments], capture_output=True, text=True, check=False, timeout=60, cwd=ROOT
    )


def attach(ground: Ground, config: Path, cgroup: Path | None = None, before: tuple[str, ...] = ()) -> list[str]:
    """The words of an attach that must be refused with 69."""
    where = str(cgroup or ground.cgroup)
    done = cli("attach", "--cgroup", where, "-c", str(config), "--instance", ground.instance.name, before=before)
    assert done.returncode == 69, (done.stdout, done.stderr)
    assert "Traceback" not in done.stderr
    assert bpftool.hooks_on(ground.cgroup) == []
    return done.stderr.splitlines()


def test_a_cgroup_that_is_not_there(ground: Ground, config: Path) -> None:
    said, remedy = attach(ground, config, ground.cgroup / "none")
    assert said.endswith(f"cgroup {ground.cgroup}/none does not exist")
    assert f"mkdir {ground.cgroup}/none" in remedy


def test_a_directory_that_is_no_cgroup(ground: Ground, config: Path, tmp_path: Path) -> None:
    said, remedy = attach(ground, config, tmp_path)
    assert said.endswith(f"{tmp_path} is not a cgroup2 directory")
    assert str(environment.cgroup2()) in remedy


def test_the_root_cgroup(ground: Ground, config: Path) -> None:
    said, remedy = attach(ground, config, environment.cgroup2())
    assert "root cgroup" in said
    assert "--allow-root-cgroup" in remedy


@pytest.mark.parametrize(
    ("dropped", "named"),
    [
        (("net_admin",), "CAP_NET_ADMIN"),
        (("bpf", "sys_admin"), "CAP_BPF"),
        (("perfmon", "sys_admin"), "CAP_PERFMON"),
        (("net_admin", "bpf", "perfmon", "sys_admin"), "CAP_NET_ADMIN, CAP_BPF, CAP_PERFMON"),
    ],
)
def test_missing_capabilities_are_named(ground: Ground, config: Path, dropped: tuple[str, ...], named: str) -> None:
    less = ",".join(f"-{name}" for name in dropped)
    setpriv = ("setpriv", f"--bounding-set={less}", f"--inh-caps={less}", "--")
    said, remedy = attach(ground, config, before=setpriv)
    assert said == f"meshbpf: missing capabilities: {named}"
    assert "remedy:" in remedy


def test_missing_bcc_is_named_with_its_remedy(ground: Ground, config: Path, tmp_path: Path) -> None:
    """The compiler's process finds no bcc: a Python that was not made from the distribution's."""
    without = tmp_path / "python"
    without.write_text(
        "#!/bin/sh\n"
        f'exec {sys.executable} -c \'import runpy, sys; sys.modules["bcc"] = None;'
        ' runpy.run_module("loader.compile", run_name="__main__")\'\n'
    )
    without.chmod(0o755)
    begin = f"import sys; sys.executable = {str(without)!r}; from meshbpf.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", begin, "attach", "--cgroup", str(ground.cgroup), "-c", str(config),
         "--instance", ground.instance.name],
        capture_output=True, text=True, check=False, timeout=60, cwd=ROOT,
    )  # fmt: skip
    assert done.returncode == 69, done.stderr
    assert done.stderr.splitlines()[0] == "meshbpf: bcc (Python) is missing"
    assert "apt-get install python3-bpfcc" in done.stderr
    assert not ground.instance.pins.exists()


def test_bpffs_that_is_not_mounted_is_mounted(ground: Ground, config: Path) -> None:
    """In a mount namespace of its own: what is pinned there ends with it, and so do the links."""
    script = (
        'umount /sys/fs/bpf && ! grep -q "/sys/fs/bpf bpf" /proc/self/mounts && "$@" && '
        'grep "/sys/fs/bpf bpf" /proc/self/mounts && ls /sys/fs/bpf/meshbpf'
    )
    done = cli(
        "attach", "--cgroup", str(ground.cgroup), "-c", str(config), "--instance", ground.instance.name,
        before=("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == ground.instance.name


def test_bpffs_that_cannot_be_mounted(ground: Ground, config: Path) -> None:
    script = 'umount /sys/fs/bpf && exec setpriv --bounding-set=-sys_admin --inh-caps=-sys_admin -- "$@"'
    said, remedy = attach(
        ground, config, before=("unshare", "--mount", "--propagation", "private", "sh", "-c", script, "sh")
    )
    assert "bpffs is not mounted at /sys/fs/bpf" in said
    assert "mount -t bpf" in remedy


def test_the_layout_of_the_pins_follows_sizes_and_abi(ground: Ground) -> None:
    ground.attach(mesh())
    assert ground.instance.read_state()["layout"].startswith(abi.layout(SIZES))
