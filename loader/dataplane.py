"""Attach, apply, detach, read: the whole life of an instance in the kernel. Everything is reached by pin.

The rules: tables are full before the first hook is attached; connect hooks come last and go first, so that nothing is
led anywhere before the rest is there; a running hook is replaced inside its link, so there is no unattached moment;
a process killed anywhere leaves only pins of ours, which the next attach adopts and `detach` removes; tables in which
redirected bytes are still unread stay pinned until they have been read.
"""

from __future__ import annotations

import contextlib
import logging
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

from loader import abi, btf, compile, datagrams, environment, libbpf, redirect
from loader.datagrams import Serving
from loader.diff import diff
from loader.instance import Instance
from loader.plan import TABLES, Ids, Plan, Tables, plan
from meshbpf import wire
from meshbpf.errors import Busy, DataplaneError, EnvironmentLack, MeshError
from meshbpf.model import MapSizes, Mesh
from meshbpf.reason import Reason

log = logging.getLogger("dataplane")
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
# table → key size, value size, per CPU
SHAPES: dict[str, tuple[int, int, bool]] = {
    "services": (20, 4, False),
    "policies": (4, 12, False),
    "slots": (8, 4, False),
    "endpoints": (4, 20, False),
    "rounds": (4, 8, False),
    "agent": (4, 24, False),
    "heartbeat": (4, 8, False),
    "flows": (32, 40, False),
    "connections": (4, 32, True),
    "serving": (8, 4, False),
    "connected": (8, 40, False),
    "talks": (32, 40, False),
    "answers": (32, 20, False),
    "counters": (4, 8, True),
}


@dataclass(frozen=True, slots=True)
class Applied:
    """What an apply did: writes made, the names of the ids now in the kernel, and whether an endpoint of a UDP port
    left: then sockets may be connected to it."""

    writes: int
    plan: Plan
    left: bool = False


class Dataplane:
    """One attached instance. Make it with `attach` (writes) or `open_pins` (reads)."""

    def __init__(self, instance: Instance, layout: str, sizes: MapSizes) -> None:
        self.instance = instance
        self.layout = layout
        self.sizes = sizes
        self.maps_folder = instance.maps(layout)
        room = {field.name: getattr(sizes, field.name) for field in fields(sizes)}
        self.maps: dict[str, libbpf.Map] = {}
        for name, (key, value, per_cpu) in SHAPES.items():
            path = self.maps_folder / name
            self.maps[name] = libbpf.Map(path, key, value, room.get(name, 0), per_cpu)
        self._have: Tables | None = None
        self._serving = Serving(self.maps["serving"])

    # --- writing ---------------------------------------------------------------------------------------------

    def apply(self, mesh: Mesh) -> Applied:
        """Make the kernel hold `mesh`. Raises MapFull (nothing lost: what was there stays served)."""
        have = self.read_tables() if self._have is None else self._have
        state = self._agent_state()
        planned = plan(mesh, have, Ids(state.next_service, state.next_endpoint))
        self._have = None  # a failure half-way is read back from the kernel next time
        state.next_service, state.next_endpoint = planned.free.service, planned.free.endpoint
        self.maps["agent"].update(bytes(4), bytes(state))
        self._make_rows(planned)
        serving = datagrams.serving(planned)
        self._serving.add(serving)
        writes = 0
        for write in diff(have, planned.tables):
            if write.value is None:
                self.maps[write.table].delete(write.key)
            else:
                self.maps[write.table].update(write.key, write.value)
            writes += 1
        self._drop_rows(planned)
        left = self._serving.remove(serving)
        self._have = planned.tables
        return Applied(writes, planned, left)

    def _make_rows(self, planned: Plan) -> None:
        """Every service id has its round-robin position and its connection counts before a hook can look."""
        for name in ("rounds", "connections"):
            there = set(self.maps[name].keys())
            for service_id in planned.service_ids:
                key = service_id.to_bytes(4, "little")
                if key not in there:  # else it goes on counting
                    self.maps[name].update(key, bytes(self.maps[name].value_size))

    def _drop_rows(self, planned: Plan) -> None:
        for name in ("rounds", "connections"):
            for key in list(self.maps[name].keys()):
                if int.from_bytes(key, "little") not in planned.service_ids:
                    self.maps[name].delete(key)

    def set_agent(self, proxy_port: int, exempt_cgroup: int) -> None:
        """Tell connect where the proxy listens and whose connections are our own (0: nobody's)."""
        state = self._agent_state()
        state.exempt_cgroup, state.proxy_port = exempt_cgroup, proxy_port
        self.maps["agent"].update(bytes(4), bytes(state))

    def _agent_state(self) -> abi.AgentState:
        return abi.AgentState.from_buffer_copy(self.maps["agent"].lookup(bytes(4)) or bytes(24))

    def beat(self, now_ns: int) -> None:
        """A worker lives: CLOCK_MONOTONIC in nanoseconds."""
        self.maps["heartbeat"].update(bytes(4), now_ns.to_bytes(8, "little"))

    # --- reading ---------------------------------------------------------------------------------------------

    def read_tables(self) -> Tables:
        return Tables(**{name: dict(self.maps[name].items()) for name in TABLES})

    def counters(self) -> dict[tuple[str, str], int]:
        """(program, reason) → verdicts since attach, all CPUs; zero counts are left out."""
        found = {}
        for index in range(abi.COUNTERS):
            raw = self.maps["counters"].lookup(index.to_bytes(4, "little")) or b""
            total = sum(int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8))
            if total:
                program = abi.Program(index // abi.REASON_STRIDE).name.lower()
                found[program, Reason(index % abi.REASON_STRIDE).word] = total
        return found

    def connections(self) -> dict[int, tuple[int, int, int, int]]:
        """Service id → (opened direct, opened proxy, closed direct, closed proxy), all CPUs."""
        found = {}
        for key, raw in self.maps["connections"].items():
            words = [int.from_bytes(raw[at : at + 8], "little") for at in range(0, len(raw), 8)]
            a, b, c, d = (sum(words[i::4]) for i in range(4))
            found[int.from_bytes(key, "little")] = (a, b, c, d)
        return found

    def close(self) -> None:
        for table in self.maps.values():
            table.close()


def _redirect_defines() -> tuple[dict[str, int], str]:
    """What bpf/lib/member.h needs to know, or why this kernel cannot have the redirect."""
    try:
        return btf.redirect_defines(), ""
    except EnvironmentLack as error:
        return {}, error.what


def attach_steps(instance: Instance, cgroups: Sequence[Path], mesh: Mesh, naive: bool = False) -> Iterator[str]:
    """Attach or upgrade, a step at a time; yields each finished step's name. The caller holds the instance's lock.

    `naive` also loads the self-test's control program.

    Drive it to the end; a test kills the process between any two steps and finds that attach and detach still work.
    """
    environment.require_capabilities()
    environment.require_bpffs()
    _refuse_shared(instance, cgroups)
    sizes = mesh.agent.maps
    cookies = environment.has_netns_cookies()
    fields_of_kernel, lack = _redirect_defines()
    layout = abi.layout(sizes) + ("" if cookies else "-nocookie") + ("" if fields_of_kernel else "-noredirect")
    maps, stage = instance.maps(layout), instance.pins / "stage"
    for folder in (instance.pins.parent, instance.pins, maps, instance.programs, instance.links, stage):
        _make_own(folder)
    yield "folders"
    defines = {f"SIZE_{field.name.upper()}": getattr(sizes, field.name) for field in fields(sizes)}
    defines["NETNS_COOKIES"] = int(cookies)
    defines["SET_RETVAL"] = int(environment.has_set_retval())
    defines |= {"REDIRECT": int(bool(fields_of_kernel)), "SELFTEST": int(naive), **fields_of_kernel}
    optional = (*redirect.PROGRAMS, *((redirect.NAIVE,) if naive else ())) if fields_of_kernel else ()
    job = compile.Job(str(maps), str(stage), defines, tuple(CGROUP_HOOKS), optional)
    lack = lack or " ".join(f"{name}: {why}" for name, why in compile.compile_and_pin(job).items())
    yield "compiled"
    dataplane = Dataplane(instance, layout, sizes)
    try:
        dataplane.apply(mesh)
        yield "filled"
        if fields_of_kernel:
            if lack:
                redirect.discard(maps, stage)
            else:
                redirect.attach(maps, stage)
            yield "redirect"
        yield from _attach_hooks(instance, cgroups, stage)
        for name in CGROUP_HOOKS:
            (stage / name).rename(instance.programs / name)
        stage.rmdir()
        yield "programs kept"
        _drop_stale(instance, cgroups, layout)
        write_state(instance, layout, cgroups, mesh, lack)
        yield "state written"
    finally:
        dataplane.close()


def _make_own(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    environment.require_own(folder)


def _refuse_shared(instance: Instance, cgroups: Sequence[Path]) -> None:
    """Raises Busy when another instance leads one of the cgroups: each call has one mesh. Nested ones are fine: the
    inner instance leads what it knows, the outer one the rest.
    """
    for cgroup in cgroups:
        for pin in instance.pins.parent.glob(f"*/links/{cgroup.stat().st_ino}-*"):
            other = pin.parent.parent.name
            if other != instance.name:
                raise Busy(f"{cgroup} is led by instance {other}: name another cgroup, or detach --instance {other}")


def _attach_hooks(instance: Instance, cgroups: Sequence[Path], stage: Path) -> Iterator[str]:
    """Replace what runs, connect first: with other tables, a new sockops would not know what an old connect decided.
    Then attach what is missing, connect last.
    """
    missing = []
    for hook in reversed(CGROUP_HOOKS):
        with _opened(stage / hook) as program:
            for cgroup in cgroups:
                pin = instance.links / f"{cgroup.stat().st_ino}-{hook}"
                if not pin.exists():
                    missing.append((hook, cgroup, pin))
                    continue
                with _opened(pin) as link:
                    libbpf.link_update(link, program)
                yield f"{hook} on {cgroup.name}"
    for hook, cgroup, pin in reversed(missing):
        with _opened(stage / hook) as program:
            target = os.open(cgroup, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            try:
                link = libbpf.link_create(program, target, CGROUP_HOOKS[hook])
            except DataplaneError as error:
                raise DataplaneError(
                    f"{hook} on {cgroup}: {error}; a program attached there without BPF_F_ALLOW_MULTI refuses others:"
                    f" bpftool cgroup show {cgroup} effective"
                ) from error
            finally:
                os.close(target)
            libbpf.pin(link, pin)
            os.close(link)
        yield f"{hook} on {cgroup.name}"


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
                for _ in _attach_hooks(instance, [cgroup], instance.programs):
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


def _drop_stale(instance: Instance, cgroups: Sequence[Path], layout: str) -> None:
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


def write_state(
    instance: Instance, layout: str, cgroups: Sequence[Path], mesh: Mesh, redirect_lack: str | None = None
) -> None:
    """`redirect_lack`: why this kernel has no redirect, empty when it has; None keeps what attach found."""
    lack = instance.read_state().get("redirectLack", "") if redirect_lack is None else redirect_lack
    instance.write_state(
        {
            "schemaVersion": 1,
            "layout": layout,
            "cgroups": [str(c) for c in cgroups],
            "mesh": wire.encode(mesh),
            "redirectLack": lack,
        }
    )


def attach(instance: Instance, cgroups: Sequence[Path], mesh: Mesh, naive: bool = False) -> None:
    """All of `attach_steps`. A first attach that fails leaves nothing; a failed upgrade leaves what ran before."""
    first, begun = not instance.read_state(), False
    try:
        for _ in attach_steps(instance, cgroups, mesh, naive):
            begun = True
    except (MeshError, OSError):
        if first and begun:
            with contextlib.suppress(Busy):  # what an earlier detach had to leave
                detach(instance)
        raise


def open_pins(instance: Instance) -> tuple[Dataplane, Mesh] | None:
    """The attached instance and the mesh last applied, for reading; None when nothing is attached."""
    state = instance.read_state()
    if not state or not instance.maps(state["layout"]).is_dir():
        return None
    mesh = wire.decode(Mesh, state["mesh"])
    return Dataplane(instance, state["layout"], mesh.agent.maps), mesh


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


def netns_cookie(sock: socket.socket) -> int:
    """The namespace of `sock` as the kernel programs name it; 0 where this kernel cannot tell."""
    if not environment.has_netns_cookies():
        return 0
    raw: Any = sock.getsockopt(socket.SOL_SOCKET, environment.SO_NETNS_COOKIE, 8)
    return int.from_bytes(raw, "little")
