"""Taking an instance apart, and what an upgrade leaves over.

The rules: connect hooks go first; tables in which redirected bytes are still unread stay pinned until they have been
read; whatever a killed process has left of ours goes too.
"""

from __future__ import annotations

import contextlib
import logging
import shutil
from collections.abc import Sequence
from pathlib import Path

from loader import environment, redirect
from loader.hooks import CGROUP_HOOKS
from loader.instance import Instance
from meshbpf.errors import Busy, DataplaneError

log = logging.getLogger("dataplane")


def detach(instance: Instance, lose_unread: bool = False) -> list[str]:
    """Remove every pin and file of the instance, connect hooks first; returns what was removed. Idempotent.

    Raises Busy when applications have not read all that was redirected to them: then only the tables that hold it are
    left, and another detach removes them. `lose_unread` is for those whose connections are their own.
    """
    removed: list[str] = []
    kept: list[Path] = []
    unread = 0
    for folder in (instance.pins.parent, instance.pins):
        if folder.exists():
            environment.require_own(folder)
    if instance.links.is_dir():
        order = {hook: index for index, hook in enumerate(reversed(CGROUP_HOOKS))}
        for pin in sorted(instance.links.iterdir(), key=lambda pin: order.get(pin.name.split("-")[-1], 99)):
            pin.unlink()
            removed.append(f"link {pin.name}")
    if instance.pins.is_dir():
        for folder in instance.pins.glob("maps-*"):
            held = _drain(folder)
            if held and not lose_unread:
                kept.append(folder)
                unread += held
            else:
                removed += _remove_tables(folder)
        for path in sorted(instance.pins.rglob("*"), reverse=True):
            if any(path.is_relative_to(folder) for folder in kept):
                continue
            if path.is_dir():
                path.rmdir()
            else:
                path.unlink()
                removed.append(f"program {path.name}")
        if not kept:
            instance.pins.rmdir()
            with contextlib.suppress(OSError):  # another instance lives beside us
                instance.pins.parent.rmdir()
    if instance.run.is_dir():
        with contextlib.suppress(OSError):  # somebody who waits for our lock makes it anew
            shutil.rmtree(instance.run)
        removed.append(f"run directory {instance.run}")
        with contextlib.suppress(OSError):
            instance.run.parent.rmdir()
    if kept:
        raise Busy(
            f"instance {instance.name} leads nobody any more, but {unread} connections still hold unread bytes:"
            " run detach again when their applications have read them, or have ended"
        )
    return removed


def drop_stale(instance: Instance, cgroups: Sequence[Path], layout: str) -> None:
    """Links of cgroups no longer named, and tables of an older layout."""
    kept = {str(cgroup.stat().st_ino) for cgroup in cgroups}
    for pin in sorted(instance.links.iterdir()):
        if pin.name.split("-")[0] not in kept:
            pin.unlink()
    for folder in instance.pins.glob("maps-*"):
        if folder != instance.maps(layout):
            unread = _drain(folder)
            if unread:
                log.warning("earlier tables stay, %d connections hold unread bytes: attach or detach again", unread)
            else:
                _remove_tables(folder)


def _drain(folder: Path) -> int:
    """How many sockets still hold redirected bytes that nobody has read: with the tables the bytes would go."""
    try:
        return redirect.drain(folder)
    except DataplaneError:  # of another version, or half taken apart: whoever is in may hold bytes
        return redirect.members(folder)


def _remove_tables(folder: Path) -> list[str]:
    """The command program goes first: whoever finds the rest without it knows that the table is drained."""
    pins = sorted(folder.iterdir(), key=lambda pin: (pin.name != redirect.COMMAND, pin.name))
    for pin in pins:
        pin.unlink()
    folder.rmdir()
    return [f"map {pin.name}" for pin in pins]
