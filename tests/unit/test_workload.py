"""Who a caller is, by its cgroup: every form that runtimes and kubelets of both cgroup drivers give one."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbpf.runtime.workload import Identity, Kind, Workloads, identify

ID = "4f3c2b1a" * 8
OTHER = "0123abcd" * 8
UID = "c0ffee00-1234-4abc-9def-0123456789ab"
SLICE_UID = UID.replace("-", "_")
HASH = "0123456789abcdef0123456789abcdef"


def pod(qos: str, container: str = ID, uid: str = UID) -> Identity:
    return Identity(Kind.POD, uid, container, qos)


def container(id: str = ID) -> Identity:
    return Identity(Kind.CONTAINER, id)


def unit(name: str) -> Identity:
    return Identity(Kind.UNIT, name)


@pytest.mark.parametrize(
    ("path", "who"),
    [
        # systemd
        ("/system.slice/nginx.service", unit("nginx.service")),
        ("/system.slice/nginx.service/worker", unit("nginx.service")),
        ("/mesh.slice/mesh-shop.slice/orders@2.service", unit("orders@2.service")),
        ("/system.slice/system-getty.slice/getty@tty1.service", unit("getty@tty1.service")),
        ("/init.scope", unit("init.scope")),
        ("/user.slice/user-1000.slice/session-3.scope", unit("session-3.scope")),
        ("/user.slice/user-1000.slice/user@1000.service/app.slice/app-editor.scope", unit("app-editor.scope")),
        ("/user.slice/user-1000.slice/user@1000.service/init.scope", unit("init.scope")),
        ("/user.slice/user-1000.slice/user@1000.service", unit("user@1000.service")),
        ("/machine.slice/systemd-nspawn@web.service/payload/init.scope", unit("systemd-nspawn@web.service")),
        # docker
        (f"/system.slice/docker-{ID}.scope", container()),
        (f"/docker/{ID}", container()),
        (f"/docker/{ID}/system.slice/nginx.service", container()),
        (f"/docker/{ID}/docker/{OTHER}", container()),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/docker-{ID}.scope", container()),
        # containerd and nerdctl
        (f"/system.slice/nerdctl-{ID}.scope", container()),
        (f"/default/{ID}", container()),
        # podman, as root and not, with a cgroup below its own, and in a pod of podman's
        (f"/machine.slice/libpod-{ID}.scope", container()),
        (f"/machine.slice/libpod-{ID}.scope/container", container()),
        (f"/user.slice/user-1000.slice/user@1000.service/user.slice/libpod-{ID}.scope/container", container()),
        (f"/libpod_parent/libpod-{ID}", container()),
        (f"/machine.slice/machine-libpod_pod_{OTHER}.slice/libpod-{ID}.scope", container()),
        (f"/machine.slice/libpod-conmon-{ID}.scope", unit(f"libpod-conmon-{ID}.scope")),
        # CRI-O outside of a pod's slice, and its monitor
        (f"/system.slice/crio-{ID}.scope", container()),
        (f"/system.slice/crio-conmon-{ID}.scope", unit(f"crio-conmon-{ID}.scope")),
        # Kubernetes, systemd driver
        (
            "/kubepods.slice/kubepods-burstable.slice/"
            f"kubepods-burstable-pod{SLICE_UID}.slice/cri-containerd-{ID}.scope",
            pod("burstable"),
        ),
        (
            f"/kubepods.slice/kubepods-besteffort.slice/kubepods-besteffort-pod{SLICE_UID}.slice/crio-{ID}.scope",
            pod("besteffort"),
        ),
        (f"/kubepods.slice/kubepods-pod{SLICE_UID}.slice/cri-containerd-{ID}.scope", pod("guaranteed")),
        (f"/kubepods.slice/kubepods-pod{SLICE_UID}.slice/docker-{ID}.scope", pod("guaranteed")),
        (f"/kubepods.slice/kubepods-pod{SLICE_UID}.slice/crio-{ID}.scope/container", pod("guaranteed")),
        (f"/kubepods.slice/kubepods-pod{SLICE_UID}.slice", pod("guaranteed", "")),
        (f"/kubepods.slice/kubepods-burstable.slice/kubepods-burstable-pod{HASH}.slice/crio-{ID}.scope",
         pod("burstable", uid=HASH)),
        # containerd told of cgroupfs while the kubelet's driver is systemd
        (f"/system.slice/containerd.service/kubepods-burstable-pod{SLICE_UID}.slice:cri-containerd:{ID}",
         pod("burstable")),
        # Kubernetes, cgroupfs driver
        (f"/kubepods/burstable/pod{UID}/{ID}", pod("burstable")),
        (f"/kubepods/besteffort/pod{UID}/{ID}", pod("besteffort")),
        (f"/kubepods/pod{UID}/{ID}", pod("guaranteed")),
        (f"/kubepods/burstable/pod{UID}/crio-{ID}", pod("burstable")),
        (f"/kubepods/burstable/pod{HASH}/{ID}", pod("burstable", uid=HASH)),
        # a node that is itself a container (kind), with both drivers
        (f"/docker/{OTHER}/kubelet/kubepods/burstable/pod{UID}/{ID}", pod("burstable")),
        (
            f"/system.slice/docker-{OTHER}.scope/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-besteffort.slice/"
            f"kubelet-kubepods-besteffort-pod{SLICE_UID}.slice/cri-containerd-{ID}.scope",
            pod("besteffort"),
        ),
        # nothing that anybody has a name for
        ("/mesh.slice", Identity(Kind.CGROUP, "/mesh.slice")),
        ("/kubepods.slice/kubepods-burstable.slice", Identity(Kind.CGROUP, "/kubepods.slice/kubepods-burstable.slice")),
        ("/apps/shop", Identity(Kind.CGROUP, "/apps/shop")),
        (f"/apps/pod{UID}", Identity(Kind.CGROUP, f"/apps/pod{UID}")),
        (f"/apps/{ID[:-1]}", Identity(Kind.CGROUP, f"/apps/{ID[:-1]}")),
        ("/apps/x.service", Identity(Kind.CGROUP, "/apps/x.service")),
        ("/", Identity(Kind.CGROUP, "/")),
        ("", Identity(Kind.CGROUP, "/")),
    ],
)  # fmt: skip
def test_who(path: str, who: Identity) -> None:
    assert identify(path) == who


def test_labels() -> None:
    assert pod("burstable").label == f"pod {UID}"
    assert container().label == f"container {ID[:12]}"
    assert unit("a.service").label == "a.service"
    assert identify("/apps").label == "/apps"


def test_ids_are_looked_up_below_the_attached_cgroups(tmp_path: Path) -> None:
    """Any directories will do: an id is an inode number."""
    shop = tmp_path / "mesh.slice" / "shop.service"
    shop.mkdir(parents=True)
    (tmp_path / "other").mkdir()
    workloads = Workloads(tmp_path, [tmp_path / "mesh.slice"])
    assert workloads(shop.stat().st_ino) == "shop.service"
    assert workloads.path(shop.stat().st_ino) == "/mesh.slice/shop.service"
    stranger = (tmp_path / "other").stat().st_ino
    assert (workloads(stranger), workloads.path(stranger)) == (f"cgroup {stranger}", "")
    late = shop / "late"
    late.mkdir()
    assert workloads.path(late.stat().st_ino) == "/mesh.slice/shop.service/late"
