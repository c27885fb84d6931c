"""Attaching an instance, or upgrading it in place: prepare, then lead.

The rules: tables are full before the first hook is attached; what is led while hooks are replaced is known to the
tables that come; a process killed anywhere leaves only pins of ours, which the next attach adopts and `detach` removes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, fields
from pathlib import Path

from loader import abi, btf, compile, environment, libbpf, redirect
from loader.carry import Carry
from loader.compile import Compiler
from loader.detach import detach, drop_stale
from loader.hooks import CGROUP_HOOKS, attach_hooks, refuse_shared
from loader.instance import Instance
from loader.planner import Planner
from loader.tables import SHAPES, Dataplane
from meshbpf import wire
from meshbpf.errors import Busy, DataplaneError, EnvironmentLack, MeshError
from meshbpf.model import MapSizes, Mesh


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tables that are filled and programs that are loaded, but lead nobody yet. `first`: nothing was attached before.

    `earlier` is the folder of the tables that were in use before, if these are others. `lack` is why this kernel has no
    redirect. `planner` knows what the tables hold.
    """

    instance: Instance
    cgroups: Sequence[Path]
    mesh: Mesh
    layout: str
    lack: str
    first: bool
    earlier: Path | None
    planner: Planner | None

    @property
    def same_tables(self) -> bool:
        return not self.first and self.earlier is None


def attach_steps(instance: Instance, cgroups: Sequence[Path], mesh: Mesh, naive: bool = False) -> Iterator[str]:
    """Attach or upgrade, a step at a time; yields each finished step's name. The caller holds the instance's lock.

    Drive it to the end; a test kills the process between any two steps and finds that attach and detach still work.
    """
    prepared = yield from _prepare_steps(instance, cgroups, mesh, naive)
    yield from _lead_steps(prepared)


def _prepare_steps(
    instance: Instance,
    cgroups: Sequence[Path],
    mesh: Mesh,
    naive: bool = False,
    compiler: Compiler | None = None,
    planned: Callable[[], None] = lambda: None,
) -> Generator[str, None, Prepared]:
    """`naive` also loads the self-test's control program."""
    environment.require_capabilities()
    environment.require_bpffs()
    refuse_shared(instance, cgroups)
    before = instance.read_state()
    sizes = mesh.agent.maps
    cookies = environment.has_netns_cookies()
    fields_of_kernel, lack = _redirect_defines()
    layout = abi.layout(sizes) + ("" if cookies else "-nocookie") + ("" if fields_of_kernel else "-noredirect")
    maps, stage = instance.maps(layout), _stage(instance)
    for folder in (instance.pins.parent, instance.pins, maps, instance.programs, instance.links, stage):
        _make_own(folder)
    yield "folders"
    optional = (*redirect.PROGRAMS, *((redirect.NAIVE,) if naive else ())) if fields_of_kernel else ()
    job = compile.Job(str(maps), str(stage), _defines(sizes, naive), tuple(CGROUP_HOOKS), optional)
    refused = (compiler or Compiler()).run(job)
    lack = lack or " ".join(f"{name}: {why}" for name, why in refused.items())
    yield "compiled"
    with contextlib.closing(Dataplane(instance, layout, sizes)) as dataplane:
        dataplane.apply(mesh, planned)
        planner = dataplane.planner
    yield "filled"
    if fields_of_kernel:
        if lack:
            redirect.discard(maps, stage)
        else:
            redirect.attach(maps, stage)
        yield "redirect"
    earlier = instance.maps(before["layout"]) if before.get("layout", layout) != layout else None
    return Prepared(instance, cgroups, mesh, layout, lack, not before, earlier, planner)


def _lead_steps(prepared: Prepared) -> Iterator[str]:
    instance, cgroups, stage = prepared.instance, prepared.cgroups, _stage(prepared.instance)
    if prepared.earlier is None:
        yield from attach_hooks(instance, cgroups, stage, prepared.same_tables)
    else:
        with Carry(prepared.earlier, instance.maps(prepared.layout)) as carry:
            carry.over()
            yield from attach_hooks(instance, cgroups, stage, False, carry.over)
    for name in CGROUP_HOOKS:
        (stage / name).rename(instance.programs / name)
    stage.rmdir()
    yield "programs kept"
    drop_stale(instance, cgroups, prepared.layout)
    write_state(instance, prepared.layout, cgroups, prepared.mesh, prepared.lack)
    yield "state written"


def foresee(compiler: Compiler, sizes: MapSizes) -> None:
    """Have `compiler` begin with what a `prepare` for tables of these sizes will ask of it."""
    with contextlib.suppress(MeshError):  # what this machine lacks, `prepare` says
        compiler.begin(_defines(sizes, naive=False))


def prepare(
    instance: Instance,
    cgroups: Sequence[Path],
    mesh: Mesh,
    compiler: Compiler | None = None,
    planned: Callable[[], None] = lambda: None,
) -> Prepared:
    """All of an attach but the leading, for who wants to be ready first. Then `lead`, or `abandon`.

    `compiler` may have begun (`foresee`); `planned` is called when what is left to do is mostly the kernel's.
    """
    steps = _prepare_steps(instance, cgroups, mesh, compiler=compiler, planned=planned)
    next(steps)  # who is refused here has made nothing
    with _undoing(instance):
        while True:
            try:
                next(steps)
            except StopIteration as end:
                return end.value  # type: ignore[no-any-return]


def lead(prepared: Prepared) -> dict[bytes, bytes]:
    """From here on callers are led by what was prepared. Returns the flows that were carried over from tables of
    another layout: who accepts no more of those connections forgets them (`Dataplane.forget`).
    """
    earlier = [folder for folder in prepared.instance.pins.glob("maps-*") if folder.name != f"maps-{prepared.layout}"]
    key, value, _per_cpu = SHAPES["flows"]
    with contextlib.ExitStack() as opened, _undoing(prepared.instance):
        flows = [opened.enter_context(libbpf.Map(folder / "flows", key, value)) for folder in earlier]
        for _ in _lead_steps(prepared):
            pass
        ours = opened.enter_context(libbpf.Map(prepared.instance.maps(prepared.layout) / "flows", key, value))
        return {k: v for table in flows if table.shape() == ours.shape() for k, v in _carried(table, ours)}


def _carried(earlier: libbpf.Map, ours: libbpf.Map) -> Iterator[tuple[bytes, bytes]]:
    """A connection that the hooks before us led, and that no worker has accepted yet, will be asked about in our table.
    Where an entry has another shape it cannot be: those few connections are closed, and counted as no_origin.
    """
    for client, flow in earlier.items():
        with contextlib.suppress(DataplaneError):  # its port has a newer connection by now
            ours.update(client, flow, libbpf.NOEXIST)
            yield client, flow


def abandon(prepared: Prepared) -> None:
    """Instead of `lead`: a first attach leaves nothing; what an upgrade has made, the next attach or detach removes."""
    if prepared.first:
        with contextlib.suppress(Busy):  # what an earlier detach had to leave
            detach(prepared.instance)


def attach(instance: Instance, cgroups: Sequence[Path], mesh: Mesh, naive: bool = False) -> None:
    """All of `attach_steps`. A first attach that fails leaves nothing; a failed upgrade leaves what ran before."""
    steps = attach_steps(instance, cgroups, mesh, naive)
    next(steps)  # who is refused here has made nothing
    with _undoing(instance):
        for _ in steps:
            pass


@contextlib.contextmanager
def _undoing(instance: Instance) -> Iterator[None]:
    """A first attach that fails within leaves nothing."""
    first = not instance.read_state()
    try:
        yield
    except (MeshError, OSError):
        if first:
            with contextlib.suppress(Busy):  # what an earlier detach had to leave
                detach(instance)
        raise


def _defines(sizes: MapSizes, naive: bool) -> dict[str, int]:
    fields_of_kernel, _lack = _redirect_defines()
    defines = {f"SIZE_{field.name.upper()}": getattr(sizes, field.name) for field in fields(sizes)}
    defines |= {"NETNS_COOKIES": int(environment.has_netns_cookies()), "MPTCP": int(btf.leads_to_mptcp())}
    defines |= {"SET_RETVAL": int(environment.has_set_retval()), "MACHINE": environment.machine()}
    return defines | {"REDIRECT": int(bool(fields_of_kernel)), "SELFTEST": int(naive), **fields_of_kernel}


def _redirect_defines() -> tuple[dict[str, int], str]:
    """What bpf/lib/member.h needs to know, or why this kernel cannot have the redirect."""
    try:
        return btf.redirect_defines(), ""
    except EnvironmentLack as error:
        return {}, error.what


def _stage(instance: Instance) -> Path:
    return instance.pins / "stage"


def _make_own(folder: Path) -> None:
    with contextlib.suppress(FileExistsError):
        folder.mkdir(mode=0o700)
    environment.require_own(folder)


def write_state(
    instance: Instance, layout: str, cgroups: Sequence[Path], mesh: Mesh, redirect_lack: str | None = None
) -> None:
    """`redirect_lack`: why this kernel has no redirect, empty when it has; None keeps what attach found."""
    lack = instance.read_state().get("redirectLack", "") if redirect_lack is None else redirect_lack
    state = {"schemaVersion": 1, "layout": layout, "cgroups": [str(c) for c in cgroups], "redirectLack": lack}
    instance.write_state(state, wire.text(mesh))
