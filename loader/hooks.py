"""The hooks on cgroups, by pinned link.

The rules: connect hooks come last and go first, so that nothing is led anywhere before the rest is there; a running
hook is replaced inside its link, so there is no unattached moment.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from loader import libbpf, neighbours
from loader.instance import Instance
from meshbpf.errors import Busy, DataplaneError

# hook → attach type, in the order of attaching
CGROUP_HOOKS = {
    "getpeername4": 29,
    "getpeername6": 30,
    "sockops": 3,
    "release": 34,
    "recvmsg4": 19,
    "recvmsg6": 20,
    "sendmsg4": 14,
    "sendmsg6": 15,
    "connect4": 10,
    "connect6": 11,
}
EARLIER = "-earlier"  # of a link that is about to go
ENDS = ("sockops", "release")  # who hear that a socket has ended


def _nothing() -> None:
    """For who keeps the tables."""


def refuse_shared(instance: Instance, cgroups: Sequence[Path]) -> None:
    """Raises Busy when another instance leads one of the cgroups: each call has one mesh. Nested ones are fine: the
    inner instance leads what it knows, the outer one the rest.
    """
    for cgroup in cgroups:
        for pin in instance.pins.parent.glob(f"*/links/{cgroup.stat().st_ino}-*"):
            other = pin.parent.parent.name
            if other != instance.name:
                raise Busy(f"{cgroup} is led by instance {other}: name another cgroup, or detach --instance {other}")


def attach_hooks(
    instance: Instance, cgroups: Sequence[Path], stage: Path, same_tables: bool, moved: Callable[[], None] = _nothing
) -> Iterator[str]:
    """Replace what runs, then attach what is missing, connect last.

    With other tables, who hears of a socket's end does not know what a connect of the other kind decided: so the
    earlier ones stay beside the new ones until connect and sendmsg have been replaced. Then `moved` is called, since
    the earlier tables get no more sockets: before anybody reads answers by ours, and again while both kinds still
    lose those that end.
    """
    running: list[tuple[str, Path, Path]] = []
    missing: list[tuple[str, Path, Path]] = []
    for hook in reversed(CGROUP_HOOKS):
        for cgroup in cgroups:
            pin = instance.links / f"{cgroup.stat().st_ino}-{hook}"
            (running if pin.exists() else missing).append((hook, cgroup, pin))
    for hook, cgroup, pin in running:
        if hook in ENDS and not same_tables:
            _attach_hook(hook, cgroup, pin, stage)
    untold = set() if same_tables else {"recvmsg", "ends"}
    for hook, cgroup, pin in running:
        phase = "ends" if hook in ENDS else hook.rstrip("46")
        if phase in untold:
            untold.remove(phase)
            moved()
        with _opened(stage / hook) as program, _opened(pin) as link:
            libbpf.link_update(link, program)
        for earlier in pin.parent.glob(f"{pin.name}{EARLIER}*"):
            earlier.unlink()
        yield f"{hook} on {cgroup.name}"
    for hook, cgroup, pin in reversed(missing):
        _attach_hook(hook, cgroup, pin, stage)
        yield f"{hook} on {cgroup.name}"


def _attach_hook(hook: str, cgroup: Path, pin: Path, programs: Path) -> None:
    """By a link of its own; one that has the pin now keeps running under another name."""
    with _opened(programs / hook) as program:
        target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            link = libbpf.link_create(program, target, CGROUP_HOOKS[hook])
        except DataplaneError as error:
            raise neighbours.refusal(hook, CGROUP_HOOKS[hook], cgroup, error) from error
        finally:
            os.close(target)
        if pin.exists():
            earlier = f"{pin.name}{EARLIER}"
            while pin.with_name(earlier).exists():  # an attach before us was killed half-way
                earlier += EARLIER
            pin.rename(pin.with_name(earlier))
        libbpf.pin(link, pin)
        os.close(link)


def reattach(instance: Instance, cgroups: Sequence[Path]) -> list[Path]:
    """Lead cgroups that were removed and made anew since the attach, by the programs that it kept; returns them. Those
    that do not exist now are left for the next time. The caller holds the instance's lock.
    """
    linked = {pin.name for pin in instance.links.iterdir()}
    inodes, anew = set(), []
    for cgroup in cgroups:
        with contextlib.suppress(FileNotFoundError):
            inodes.add(str(cgroup.stat().st_ino))
            if any(f"{cgroup.stat().st_ino}-{hook}" not in linked for hook in CGROUP_HOOKS):
                for _ in attach_hooks(instance, [cgroup], instance.programs, same_tables=True):
                    pass
                anew.append(cgroup)
    for pin in instance.links.iterdir() if anew else ():
        if pin.name.split("-")[0] not in inodes:  # of a cgroup that is no more
            pin.unlink()
    return anew


@contextlib.contextmanager
def _opened(pin: Path) -> Iterator[int]:
    fd = libbpf.get(pin)
    try:
        yield fd
    finally:
        os.close(fd)
