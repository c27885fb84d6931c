"""Who may import whom, what stays pure, and that every module is tried by a test: the table of ARCHITECTURE.md."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent.parent
PACKAGES = ("loader", "meshbpf", "userspace_proxy")
TEST_FOLDERS = ("e2e", "kernel", "proxy", "registry", "unit")

# A module's part is its folder; the files right in meshbpf/ are `common` but for the ones named here.
PARTS = {
    "meshbpf.admin": "telemetry",
    "meshbpf.telemetry": "telemetry",
    "meshbpf.register": "client",
    "meshbpf.registration": "client",
    "meshbpf.demo": "cli",
}
# part → parts that it may import besides itself
MAY_IMPORT = {
    "common": set(),
    "policy": {"common"},
    "schema": {"common"},
    "registry": {"common", "schema"},
    "loader": {"common", "policy"},
    "userspace_proxy": {"common", "policy"},
    "client": {"common", "schema", "registry"},
    "telemetry": {"common", "userspace_proxy"},
    "runtime": {"common", "policy", "schema", "registry", "loader", "userspace_proxy", "telemetry"},
    "cli": {"common", "policy", "schema", "registry", "loader", "client", "runtime"},
}
PURE = (
    "meshbpf.model", "meshbpf.changes", "meshbpf.carrier", "meshbpf.reason", "meshbpf.wire", "meshbpf.schema",
    "meshbpf.policy", "meshbpf.registry.merge", "loader.abi", "loader.header", "loader.slots", "loader.plan",
    "loader.planner", "loader.diff",
)  # fmt: skip
CLOCKS_DICE_AND_WIRES = {
    "asyncio", "logging", "multiprocessing", "random", "secrets", "select", "signal", "socket", "subprocess",
    "threading", "time", "uuid", "uvloop",
}  # fmt: skip
# Modules that only ever run in a process of their own, and the test that has them do their work.
RUN_BY = {
    "meshbpf.cli.__main__": "e2e/test_thread.py",
    "meshbpf.demo.apps": "e2e/test_demo.py",
    "meshbpf.demo.caller": "e2e/test_demo.py",
    "meshbpf.runtime.api": "e2e/test_registry.py",
    "meshbpf.runtime.main": "e2e/test_thread.py",
    "meshbpf.runtime.stop": "e2e/test_agent.py",
}


@cache
def modules() -> dict[str, Path]:
    """Every module of ours by its dotted name; a package is its __init__."""
    found = {}
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            parts = path.relative_to(ROOT).with_suffix("").parts
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


@cache
def imports(path: Path) -> frozenset[str]:
    """Dotted names that the file imports, wherever in it; of `from a import b`, both a and a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.module and not node.level, f"{path}: relative imports hide who imports whom"
            found.add(node.module)
            found.update(f"{node.module}.{alias.name}" for alias in node.names)
    return frozenset(found)


def ours(path: Path) -> set[str]:
    """Modules of ours that the file imports; a package only when nothing more is said."""
    named = {name for name in imports(path) if name in modules()}
    return {name for name in named if not any(other.startswith(f"{name}.") for other in named)}


def part(name: str) -> str:
    for prefix, found in PARTS.items():
        if name == prefix or name.startswith(f"{prefix}."):
            return found
    top, *rest = name.split(".")
    if top != "meshbpf":
        return top
    return rest[0] if rest and (ROOT / "meshbpf" / rest[0]).is_dir() else "common"


def filled() -> set[str]:
    """Modules that say something: an empty __init__ needs no test."""
    return {name for name, path in modules().items() if path.read_text().strip()}


def pure() -> list[str]:
    below = tuple(f"{prefix}." for prefix in PURE)
    return sorted(name for name in filled() if name in PURE or name.startswith(below))


@cache
def files_of_tests() -> dict[Path, frozenset[str]]:
    """Test and support files → what they import."""
    return {path: imports(path) for path in (ROOT / "tests").rglob("*.py")}


def tried_by(folders: tuple[str, ...]) -> set[str]:
    """Modules that a test in one of the folders imports, itself or through a support file, and what those import of
    their own part: a package is tried by its front door.
    """
    supports = {f"tests.{path.parent.name}.{path.stem}": names for path, names in files_of_tests().items()}
    found: set[str] = set()
    for path, names in files_of_tests().items():
        if path.parent.name in folders and path.name.startswith(("test_", "conftest")):
            found |= names.union(*(supports[name] for name in names & supports.keys()))
    waiting, tried = list(found & modules().keys()), set()
    while waiting:
        tried.add(one := waiting.pop())
        waiting += [name for name in ours(modules()[one]) - tried if part(name) == part(one)]
    return tried


def test_the_table_names_every_part() -> None:
    assert {part(name) for name in modules()} == set(MAY_IMPORT)


@pytest.mark.parametrize("name", modules())
def test_imports(name: str) -> None:
    allowed = MAY_IMPORT[part(name)] | {part(name)}
    wrong = {other for other in ours(modules()[name]) if part(other) not in allowed}
    assert not wrong, f"{name} ({part(name)}) may not import these"


def test_loader_and_proxy_are_strangers() -> None:
    assert "userspace_proxy" not in MAY_IMPORT["loader"]
    assert "loader" not in MAY_IMPORT["userspace_proxy"]


@pytest.mark.parametrize("name", pure())
def test_purity(name: str) -> None:
    """Neither it nor what it imports of ours has a clock, dice or a wire."""
    waiting, seen = [name], set()
    while waiting:
        seen.add(one := waiting.pop())
        wrong = {other.split(".")[0] for other in imports(modules()[one])} & CLOCKS_DICE_AND_WIRES
        assert not wrong, f"{one} imports {wrong}" + ("" if one == name else f", and {name} imports it")
        waiting += ours(modules()[one]) - seen


def test_only_one_file_imports_bcc() -> None:
    importers = {name for name, path in modules().items() if any(n.split(".")[0] == "bcc" for n in imports(path))}
    assert importers == {"loader.compile"}


def test_every_pure_module_has_a_unit_test() -> None:
    assert set(pure()) - tried_by(("unit",)) == set()


def test_every_other_module_is_tried_by_a_test() -> None:
    assert filled() - set(pure()) - tried_by(TEST_FOLDERS) == set(RUN_BY), (
        "name its test in RUN_BY, or drop it from there"
    )
    for name, test in RUN_BY.items():
        assert (ROOT / "tests" / test).is_file(), f"{name}: {test}"
