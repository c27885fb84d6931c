"""What this machine must have before anything is attached; every lack is named with its remedy. Changes nothing but
mounting bpffs when it may.
"""

from __future__ import annotations

import ctypes as ct
import errno
import os
import pwd
import socket
import stat
from pathlib import Path

from loader import libbpf
from loader.instance import BPFFS
from meshbpf.errors import EnvironmentLack

CAPABILITIES = {12: "CAP_NET_ADMIN", 39: "CAP_BPF", 38: "CAP_PERFMON"}
CAP_SYS_ADMIN = 21
TO_SERVE = {21: "CAP_SYS_ADMIN", 19: "CAP_SYS_PTRACE"}  # setns, and looking into /proc/PID/ns
LET_BPF = (
    "allow bpf() in the seccomp profile (of a container: --security-opt seccomp=FILE, of a unit: SystemCallFilter=bpf)"
    " or in the security module's policy"
)
WHOLE_TREE = "start the container with --cgroupns=host -v /sys/fs/cgroup:/sys/fs/cgroup"
OBJ_GET = 7
SO_NETNS_COOKIE = 71
SOCK_ADDR, SET_RETVAL = 18, 187  # a program's type, a helper's number


def mounts() -> list[tuple[str, str]]:
    """(mount point, file system type) of everything mounted, in order."""
    lines = Path("/proc/self/mounts").read_text().splitlines()
    return [(fields[1], fields[2]) for fields in (line.split() for line in lines)]


def cgroup2() -> Path:
    """Where cgroup2 is mounted. Raises EnvironmentLack when it is not."""
    for point, kind in mounts():
        if kind == "cgroup2":
            return Path(point)
    raise EnvironmentLack("cgroup2 is not mounted", "mount -t cgroup2 none /sys/fs/cgroup")


def is_namespaced(top: Path) -> bool:
    """`top` is not the machine's root cgroup but the top of a container's cgroup namespace: it has a type, which a root
    has not.
    """
    return (top / "cgroup.type").exists()


def missing_capabilities() -> list[str]:
    """Names of the capabilities we need and lack; CAP_SYS_ADMIN stands for CAP_BPF and CAP_PERFMON on old kernels."""
    held = _held()
    admin = bool(held >> CAP_SYS_ADMIN & 1)
    return [name for bit, name in CAPABILITIES.items() if not (held >> bit & 1 or (admin and name != "CAP_NET_ADMIN"))]


def missing_to_serve() -> list[str]:
    """Names of the capabilities that `run` lacks for callers in network namespaces other than its own."""
    return [name for bit, name in TO_SERVE.items() if not _held() >> bit & 1]


def _held() -> int:
    """The effective capabilities, a bit each."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            return int(line.split()[1], 16)
    return 0


def require_capabilities() -> None:
    missing = missing_capabilities()
    if missing:
        raise EnvironmentLack(
            f"missing capabilities: {', '.join(missing)}", "run as root (sudo), or grant them to the unit"
        )
    if refused := bpf_refused():
        raise EnvironmentLack(refused, LET_BPF)


def bpf_refused() -> str:
    """Why bpf() is refused, to a caller who has the capabilities; empty when it is not. Opening a pin that nobody has
    needs none of what the kernel itself could refuse.
    """
    path = ct.create_string_buffer(os.fsencode(BPFFS / "meshbpf-nobody-has-this"))
    attr = (ct.c_uint64 * 2)(ct.addressof(path))
    done = libbpf.libc().syscall(libbpf.SYS_BPF, OBJ_GET, attr, ct.c_uint32(ct.sizeof(attr)))
    number = ct.get_errno()
    if done >= 0 or number not in (errno.EPERM, errno.ENOSYS):
        return ""
    return f"bpf() is refused with {errno.errorcode[number]} although the capabilities are there{filtered()}"


def filtered() -> str:
    """Words about a seccomp filter on this process, which may be why something is refused; empty without one."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return ": this process runs under a seccomp filter" if "Seccomp:\t2" in lines else ""


def require_bpffs() -> None:
    """bpffs is mounted at /sys/fs/bpf; mounts it when it is not and we may. Raises EnvironmentLack otherwise."""
    if (str(BPFFS), "bpf") in mounts():
        return
    if libbpf.libc().mount(b"bpf", os.fsencode(BPFFS), b"bpf", ct.c_ulong(0), b"mode=0700") != 0:
        number = ct.get_errno()
        raise EnvironmentLack(
            f"bpffs is not mounted at {BPFFS} ({os.strerror(number)})", f"mount -t bpf -o mode=0700 bpf {BPFFS}"
        )


def require_own(folder: Path) -> None:
    """`folder` is a directory of ours that nobody else may enter: bpffs is often mounted for everybody to write in, and
    whoever made the folder before us could exchange our pins. Raises EnvironmentLack.
    """
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode):
        what = "is no directory"
    elif found.st_uid != os.geteuid():
        what = f"belongs to {_user(found.st_uid)}, not to {_user(os.geteuid())}"
    elif found.st_mode & 0o077:
        what = f"is open to others than {_user(found.st_uid)} (mode {found.st_mode & 0o777:o})"
    else:
        return
    raise EnvironmentLack(
        f"{folder} {what}",
        f"look who made it, then rm -r {folder}; keep others out: mount -o remount,mode=0700 {BPFFS}",
    )


def _user(uid: int) -> str:
    try:
        return f"{pwd.getpwuid(uid).pw_name} (uid {uid})"
    except KeyError:
        return f"uid {uid}"


def check_cgroup(path: Path, allow_root: bool = False) -> Path:
    """`path` as an absolute cgroup2 directory. Raises EnvironmentLack: missing, another file system, the root."""
    top = cgroup2()
    resolved = path.resolve()
    if not resolved.is_dir():
        remedy = f"mkdir {path}, or name a systemd slice, such as {top}/system.slice"
        if is_namespaced(top):
            remedy = f"to lead callers outside of this container, {WHOLE_TREE}"
        raise EnvironmentLack(f"cgroup {path} does not exist", remedy)
    within_cgroup2(path)
    tops = _tops()
    if resolved in tops and not allow_root and is_namespaced(resolved):
        raise EnvironmentLack(
            f"{path} is the top of a container's cgroup namespace: nobody outside of it can be led",
            f"{WHOLE_TREE}, or say --allow-root-cgroup to lead what runs in this container",
        )
    if resolved in tops and not allow_root:
        raise EnvironmentLack(
            f"{path} is the machine's root cgroup: every process would be led",
            "choose a child cgroup, or say --allow-root-cgroup",
        )
    return resolved


def within_cgroup2(path: Path) -> Path:
    """`path` as an absolute cgroup2 directory, there or still to be made. Raises EnvironmentLack when it would be a
    directory like any other, whose processes nobody leads.
    """
    resolved = path.resolve()
    if any(map(resolved.is_relative_to, _tops())):
        nearest = next(place for place in (resolved, *resolved.parents) if place.exists())
        if (nearest / "cgroup.procs").exists():
            return resolved
    raise EnvironmentLack(f"{path} is not a cgroup2 directory", f"choose one below {cgroup2()}")


def _tops() -> list[Path]:
    return [Path(point) for point, kind in mounts() if kind == "cgroup2"]


def machine() -> int:
    """A number below 2**31 that tells this machine, as it runs now, from others; containers have their host's."""
    return int(Path("/proc/sys/kernel/random/boot_id").read_text()[:8], 16) >> 1


def has_set_retval() -> bool:
    """Whether a cgroup hook can choose the error that its caller gets (bpf_set_retval, Linux 5.18)."""
    return int(libbpf.library().libbpf_probe_bpf_helper(SOCK_ADDR, SET_RETVAL, None)) == 1


def has_netns_cookies() -> bool:
    """Whether user space can learn a namespace's cookie (SO_NETNS_COOKIE, Linux 5.14)."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        try:
            probe.getsockopt(socket.SOL_SOCKET, SO_NETNS_COOKIE, 8)
        except OSError:
            return False
    return True
