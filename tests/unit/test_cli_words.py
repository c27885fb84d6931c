"""What a newcomer reads of the command line: help that fits a terminal, remedies, one fault a line, one and many."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest
from typer.testing import CliRunner

from loader import environment
from loader.instance import Instance
from meshbpf import cli, wire
from meshbpf.cli import options
from meshbpf.cli.output import counted
from meshbpf.errors import ConfigError, EnvironmentLack
from meshbpf.model import Agent, EmbeddedRegistry, Mesh

SERVICE = "apiVersion: meshbpf.io/v1\nkind: Service\nmetadata: {name: orders}\nspec: {ports: [{name: a, port: 1}]}\n"


def shown(*arguments: str) -> str:
    return CliRunner().invoke(cli.app, [*arguments], env={"COLUMNS": "80"}).output


COMMANDS = re.findall(r"^  (\w+)  ", shown("--help").partition("Commands:")[2], re.M)


def test_the_list_of_commands_is_not_cut() -> None:
    assert len(COMMANDS) > 10
    assert "..." not in shown("--help").partition("Commands:")[2]
    assert max(map(len, shown("--help").splitlines())) <= 80


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_shows_the_name_of_a_python_variable(command: str) -> None:
    assert re.findall(r"MESHBPF_\w*(?:FORM|_)\b", re.sub(r"\s+", " ", shown(command, "--help"))) == []


def ended(monkeypatch: pytest.MonkeyPatch, arguments: Sequence[str]) -> object:
    monkeypatch.setattr(sys, "argv", ["meshbpf", *arguments])
    with pytest.raises(SystemExit) as ending:
        cli.main()
    return ending.value.code


def test_every_fault_of_several_is_a_line_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(f"{SERVICE}---\nkind: X\n---\nkind: Y\n")
    assert ended(monkeypatch, ["validate", str(file)]) == 65
    first, *faults = capsys.readouterr().err.splitlines()
    assert first == "meshbpf: 2 faults"
    assert [fault.startswith(f"{file}:") for fault in faults] == [True, True]
    file.write_text("kind: X\n")
    assert ended(monkeypatch, ["validate", str(file)]) == 65
    (fault,) = capsys.readouterr().err.splitlines()
    assert fault.startswith(f"meshbpf: {file}:1:7: unknown kind")


@pytest.mark.parametrize(
    ("text", "says"), [("", "valid, but names no service\n"), (SERVICE, "valid: 1 service, 0 policies\n")]
)
def test_what_validate_says_of_a_good_file(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text)
    assert shown("validate", str(file)) == says


def test_no_configuration_says_which_option_names_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(options, "DEFAULT_CONFIG", tmp_path / "none")
    with pytest.raises(ConfigError, match="does not exist: name a file or directory with -c"):
        options.configuration(None)
    assert options.configuration([tmp_path]) == [tmp_path]


def test_an_absolute_cgroup_that_is_none_hears_of_relative_names(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, _allow_root: bool) -> Path:
        raise EnvironmentLack(f"{path} is not a cgroup2 directory", "choose one below /mnt")

    monkeypatch.setattr(options.environment, "check_cgroup", refuse)
    with pytest.raises(
        EnvironmentLack, match=r"choose one below /mnt; a name without a leading / is below the cgroup2"
    ):
        options.cgroups([Path("/")], False)


@pytest.mark.parametrize(("mode", "code"), [(None, 127), (0o644, 126)])
def test_exec_of_what_does_not_start_ends_as_env_does(
    mode: int | None, code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    program = tmp_path / "program"
    if mode is not None:
        program.write_text("#!/bin/sh\n")
        program.chmod(mode)
    (tmp_path / "cgroup.procs").touch()
    monkeypatch.setattr(environment, "mounts", lambda: [(str(tmp_path), "cgroup2")])
    monkeypatch.setattr("meshbpf.cli.change.cgroup.join", lambda _cgroup: None)
    assert ended(monkeypatch, ["exec", "--cgroup", "shop", "--", str(program)]) == code
    assert capsys.readouterr().err.startswith(f"meshbpf: cannot run {program}: ")
    assert subprocess.run(["env", str(program)], check=False, capture_output=True).returncode == code


@pytest.mark.parametrize("configured", [True, False])
def test_detach_names_the_file_that_stays(configured: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The one it was configured with: of a state that cannot be read, the one there is without a configuration."""
    store = tmp_path / "registry.db"
    monkeypatch.setattr("loader.instance.RUN", tmp_path / "run")
    monkeypatch.setattr("meshbpf.runtime.sources.DEFAULT_STORES", str(tmp_path))
    for name in ("cli.change.environment.require_capabilities", "cli.change.leftovers.sweep"):
        monkeypatch.setattr(f"meshbpf.{name}", lambda: None)
    monkeypatch.setattr("meshbpf.runtime.stop.stop_processes", lambda _instance: [])
    monkeypatch.setattr("meshbpf.cli.change.dataplane.detach", lambda _instance: ["link 1-connect4"])
    agent = Agent(registries=(EmbeddedRegistry(store=str(store)),))
    Instance("shop").write_state({"mesh": wire.encode(Mesh(agent))} if configured else {"mesh": {"agent": 7}})
    assert "kept" not in shown("detach", "--instance", "shop")
    store = store if configured else tmp_path / "shop.db"
    store.touch()
    last = shown("detach", "--instance", "shop").splitlines()[-1]
    assert last.startswith(f"kept {store}, ") and last.endswith(f"rm {store}*")
    Instance("other").write_state({"mesh": wire.encode(Mesh(Agent(registries=(EmbeddedRegistry(store=str(store)),))))})
    assert "rm " not in shown("detach", "--instance", "shop")


def test_one_and_many() -> None:
    assert [counted(n, "port") for n in (0, 1, 2)] == ["0 ports", "1 port", "2 ports"]
    assert counted(2, "policy", "policies") == "2 policies"


def test_exec_makes_no_directory_outside_of_cgroup2(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(environment, "mounts", lambda: [("/sys/fs/cgroup/unified", "cgroup2")])
    assert ended(monkeypatch, ["exec", "--cgroup", str(tmp_path / "shop"), "--", "true"]) == 69
    said = capsys.readouterr().err
    assert f"{tmp_path}/shop is not a cgroup2 directory" in said and "below /sys/fs/cgroup/unified" in said
    assert "without a leading /" in said and not (tmp_path / "shop").exists()


def test_who_forgot_the_instance_is_told_which_there_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("loader.instance.RUN", tmp_path / "run")
    monkeypatch.setattr("loader.instance.BPFFS", tmp_path / "bpf")
    monkeypatch.setattr(environment, "require_capabilities", lambda: None)
    monkeypatch.setattr("loader.leftovers.sweep", list)
    for command in ("status", "detach"):
        ended(monkeypatch, [command])
        assert "attached here" not in "".join(capsys.readouterr())
    for name in ("eval7", "eval8"):
        Instance(name).write_state({"cgroups": []})
    (tmp_path / "run/neighbour").mkdir()
    told = "attached here: eval7 (--instance eval7), eval8 (--instance eval8)"
    assert ended(monkeypatch, ["status"]) == 1
    first, *more = capsys.readouterr().err.splitlines()
    assert first.endswith("instance default is not attached") and more[0] == f"  {told}"
    assert ended(monkeypatch, ["exec", "--", "true"]) == 1
    assert told in capsys.readouterr().err
    assert ended(monkeypatch, ["detach"]) == 0
    assert capsys.readouterr().out.splitlines() == ["nothing attached as default", told]
    assert ended(monkeypatch, ["detach", "--instance", "neighbour"]) == 0
    run = tmp_path / "run/neighbour"
    assert f"removed run directory {run}, which" in capsys.readouterr().out and not run.exists()
