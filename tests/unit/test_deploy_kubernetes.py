"""deploy/kubernetes: valid for old and new Kubernetes, and true: its commands, paths and rights are real."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import typer
import yaml

from loader import environment
from meshbpf import admin
from meshbpf.cli import app
from meshbpf.model import AdminSettings
from meshbpf.schema.files import load
from tests.support import kustomize
from tests.support.machine import ROOT, free_port

DEPLOY = ROOT / "deploy/kubernetes"
BASE, LEAST = DEPLOY / "base", DEPLOY / "overlays/least-privilege"
VARIANTS = pytest.mark.parametrize("folder", [BASE, LEAST], ids=["base", "least-privilege"])
CAP_SYS_RESOURCE = "CAP_SYS_RESOURCE"


def pod(folder: Path) -> dict[str, Any]:
    (found,) = (one for one in kustomize.build(folder) if one["kind"] == "DaemonSet")
    spec: dict[str, Any] = found["spec"]["template"]["spec"]
    return spec


def agent(folder: Path) -> dict[str, Any]:
    (found,) = pod(folder)["containers"]
    container: dict[str, Any] = found
    return container


@VARIANTS
@pytest.mark.parametrize("version", ["1.30", "1.37"])
def test_every_object_is_valid(folder: Path, version: str, tmp_path: Path) -> None:
    path = tmp_path / "all.yaml"
    path.write_text(yaml.safe_dump_all(kustomize.build(folder)))
    command = [sys.executable, "-m", "kubernetes_validate", "--strict", "-k", version, str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=100)
    said = done.stdout + done.stderr
    assert done.returncode == 0 and said.count(" passed ") == 6 and "WARN" not in said, said


@VARIANTS
def test_the_real_kustomize_says_the_same(folder: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("kubectl is missing: tests/support/kustomize.py stands in for it")
    done = subprocess.run([kubectl, "kustomize", folder], capture_output=True, text=True, check=False, timeout=60)
    if "patchesStrategicMerge" in done.stderr:
        pytest.skip("this kubectl is older than 1.21: it knows no `patches`")
    assert done.returncode == 0 and not done.stderr, done.stderr
    theirs = {kustomize.identity(one): one for one in yaml.safe_load_all(done.stdout)}
    assert theirs == {kustomize.identity(one): one for one in kustomize.build(folder)}


@VARIANTS
async def test_every_probe_is_answered_by_the_admin_listener(folder: Path) -> None:
    async def metrics(_accept: str) -> tuple[bytes, str]:
        return b"", "text/plain"

    port = free_port()
    runner = await admin.serve(f"127.0.0.1:{port}", metrics, lambda: None)
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(5)) as session:
            for probe in ("startupProbe", "livenessProbe", "readinessProbe"):
                asked = agent(folder)[probe]["httpGet"]
                assert f"{asked['host']}:{asked['port']}" == AdminSettings().listen
                # The kubelet names host and port of the probe in its Host header.
                url, host = f"http://127.0.0.1:{port}{asked['path']}", f"{asked['host']}:{asked['port']}"
                async with session.get(url, headers={"Host": host}) as answer:
                    assert answer.status == 200, probe
    finally:
        await runner.cleanup()


@VARIANTS
def test_the_command_is_one_of_ours(folder: Path) -> None:
    container = agent(folder)
    program, verb, *arguments = container["command"]
    assert program == "meshbpf"
    group = typer.main.get_command(app)
    command = group.commands[verb]  # type: ignore[attr-defined]
    settings = {one["name"]: one["value"] for one in container["env"]}
    known = {f"MESHBPF_{verb}_{parameter.name}".upper() for parameter in command.params}
    assert set(settings) <= known
    arguments += ["--cgroup", settings["MESHBPF_RUN_CGROUP"]]
    with command.make_context(verb, arguments) as context:
        assert [str(path) for path in context.params["cgroup"]] == ["kubepods.slice"]


def test_the_configuration_is_valid(tmp_path: Path) -> None:
    (config,) = (one for one in kustomize.build(BASE) if one["kind"] == "ConfigMap")
    (tmp_path / "mesh.yaml").write_text(config["data"]["mesh.yaml"])
    mesh = load([tmp_path])
    assert [service.name for service in mesh.services] == ["orders"]
    assert mesh.agent.admin == AdminSettings()


@VARIANTS
def test_it_may_only_read(folder: Path) -> None:
    objects = kustomize.build(folder)
    roles = [one for one in objects if one["kind"].endswith("Role")]
    assert [role["metadata"]["name"] for role in roles] == ["meshbpf"]
    for rule in roles[0]["rules"]:
        assert set(rule["verbs"]) <= {"get", "list", "watch"} and "*" not in rule["resources"] + rule["apiGroups"]
    assert pod(folder)["automountServiceAccountToken"] is False


@VARIANTS
def test_a_node_loses_one_agent_at_a_time_and_last_of_all(folder: Path) -> None:
    (daemonset,) = (one for one in kustomize.build(folder) if one["kind"] == "DaemonSet")
    assert daemonset["spec"]["updateStrategy"] == {"type": "RollingUpdate", "rollingUpdate": {"maxUnavailable": 1}}
    assert pod(folder)["priorityClassName"] == "system-node-critical"
    assert pod(folder)["hostNetwork"] and pod(folder)["hostPID"]
    drain = load([BASE / "mesh.yaml"]).agent.proxy.drain
    assert pod(folder)["terminationGracePeriodSeconds"] > drain + 2.0


@VARIANTS
def test_what_outlives_the_agent_is_the_hosts(folder: Path) -> None:
    places = {mount["name"]: mount["mountPath"] for mount in agent(folder)["volumeMounts"]}
    hosts = {one["name"]: one["hostPath"]["path"] for one in pod(folder)["volumes"] if "hostPath" in one}
    assert {places[name]: path for name, path in hosts.items()} == {
        path: path for path in ("/sys/fs/bpf", "/sys/fs/cgroup", "/run/meshbpf", "/var/lib/meshbpf")
    }
    assert places.keys() >= {one["name"] for one in pod(folder)["volumes"]} >= places.keys()


def test_least_privilege_is_what_the_loader_asks_for() -> None:
    security = agent(LEAST)["securityContext"]
    assert not security["privileged"] and security["capabilities"]["drop"] == ["ALL"]
    wanted = {*environment.CAPABILITIES.values(), CAP_SYS_RESOURCE}
    assert {f"CAP_{name}" for name in security["capabilities"]["add"]} == wanted
    # Mounting for the host is for the privileged only.
    assert "Bidirectional" not in json.dumps(agent(LEAST)["volumeMounts"])
