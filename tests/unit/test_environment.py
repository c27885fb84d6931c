"""What the machine must have: every lack is named, with its remedy."""

from __future__ import annotations

from pathlib import Path

import pytest

from loader import environment
from meshbpf.errors import EnvironmentLack

NET_ADMIN, SYS_ADMIN, PERFMON, BPF = 12, 21, 38, 39


def mounted(monkeypatch: pytest.MonkeyPatch, *points: tuple[Path, str]) -> None:
    monkeypatch.setattr(environment, "mounts", lambda: [(str(point), kind) for point, kind in points])


def cgroup(path: Path) -> Path:
    path.mkdir(parents=True)
    (path / "cgroup.procs").write_text("")
    return path


def test_cgroup2_is_found_wherever_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mounted(monkeypatch, (Path("/"), "ext4"), (tmp_path, "cgroup2"))
    assert environment.cgroup2() == tmp_path


def test_no_cgroup2(monkeypatch: pytest.MonkeyPatch) -> None:
    mounted(monkeypatch, (Path("/sys/fs/cgroup"), "cgroup"))
    with pytest.raises(EnvironmentLack, match="cgroup2 is not mounted") as caught:
        environment.cgroup2()
    assert "mount -t cgroup2" in caught.value.remedy


def test_a_good_cgroup_below_any_mount(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    first, second = cgroup(tmp_path / "first"), cgroup(tmp_path / "second")
    mounted(monkeypatch, (first, "cgroup2"), (second, "cgroup2"))
    for below in (cgroup(first / "app"), cgroup(second / "app/web")):
        assert environment.check_cgroup(below) == below
    (tmp_path / "name").symlink_to(first / "app")
    assert environment.check_cgroup(tmp_path / "name") == first / "app"


def test_bad_cgroups(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    top = cgroup(tmp_path / "top")
    beside = cgroup(tmp_path / "topmost")
    mounted(monkeypatch, (top, "cgroup2"))
    (top / "no-cgroup").mkdir()
    for path, what in (
        (top / "none", "does not exist"),
        (top / "cgroup.procs", "does not exist"),
        (beside, "is not a cgroup2 directory"),
        (top / "no-cgroup", "is not a cgroup2 directory"),
        (top, "is the machine's root cgroup"),
    ):
        with pytest.raises(EnvironmentLack, match=what) as caught:
            environment.check_cgroup(path)
        assert str(path) in caught.value.what
        assert caught.value.remedy
    assert environment.check_cgroup(top, allow_root=True) == top


def test_a_cgroup_that_is_still_to_be_made(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    top = cgroup(tmp_path / "top")
    mounted(monkeypatch, (top, "cgroup2"))
    shop = cgroup(top / "shop")
    for path in (shop, shop / "web/one"):
        assert environment.within_cgroup2(path) == path
    for path in (tmp_path / "shop", cgroup(tmp_path / "topmost"), top / "../shop", shop / "cgroup.procs/web"):
        with pytest.raises(EnvironmentLack, match="is not a cgroup2 directory") as caught:
            environment.within_cgroup2(path)
        assert str(top) in caught.value.remedy
    assert not (shop / "web").exists()


@pytest.mark.parametrize(
    ("held", "missing"),
    [
        ([NET_ADMIN, PERFMON, BPF], []),
        ([NET_ADMIN, SYS_ADMIN], []),
        ([SYS_ADMIN], ["CAP_NET_ADMIN"]),
        ([NET_ADMIN], ["CAP_BPF", "CAP_PERFMON"]),
        ([], ["CAP_NET_ADMIN", "CAP_BPF", "CAP_PERFMON"]),
    ],
)
def test_capabilities(monkeypatch: pytest.MonkeyPatch, held: list[int], missing: list[str]) -> None:
    bits = sum(1 << bit for bit in held)
    monkeypatch.setattr(Path, "read_text", lambda _path: f"Name:\tx\nCapInh:\tffff\nCapEff:\t{bits:016x}\n")
    assert environment.missing_capabilities() == missing
    if missing:
        with pytest.raises(EnvironmentLack, match=", ".join(missing)):
            environment.require_capabilities()
    else:
        environment.require_capabilities()
