"""`kubectl kustomize` for tests on machines without it: as much of kustomize as deploy/kubernetes uses, and an error
for the rest. tests/unit/test_deploy_kubernetes.py compares it with the real one where that is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

KNOWN = {
    "apiVersion", "kind", "namespace", "resources", "configMapGenerator", "generatorOptions", "images", "patches"
}  # fmt: skip
CLUSTER_WIDE = ("Namespace", "ClusterRole", "ClusterRoleBinding")
Object = dict[str, Any]


def build(folder: Path) -> list[Object]:
    """The folder's objects. Raises ValueError for a key of kustomize that this does not know."""
    wanted = yaml.safe_load((folder / "kustomization.yaml").read_text())
    if unknown := set(wanted) - KNOWN:
        raise ValueError(f"{folder}: teach tests/support/kustomize.py {', '.join(sorted(unknown))}")
    objects: list[Object] = []
    for name in wanted["resources"]:
        path = folder / name
        objects += build(path) if path.is_dir() else list(yaml.safe_load_all(path.read_text()))
    for one in wanted.get("configMapGenerator", []):
        assert wanted["generatorOptions"] == {"disableNameSuffixHash": True}
        data = {name: (folder / name).read_text() for name in one["files"]}
        objects.append({"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": one["name"]}, "data": data})
    for made in objects:
        if "namespace" in wanted and made["kind"] not in CLUSTER_WIDE:
            made["metadata"]["namespace"] = wanted["namespace"]
    for image in wanted.get("images", []):
        for container in containers(objects):
            if container["image"] == image["name"]:
                container["image"] = f"{image['newName']}:{image['newTag']}"
    for patch in wanted.get("patches", []):
        changed = yaml.safe_load((folder / patch["path"]).read_text())
        (target,) = (made for made in objects if identity(made) == identity(changed))
        merge(target, changed)
    return objects


def identity(made: Object) -> tuple[str, str, str | None]:
    return made["kind"], made["metadata"]["name"], made["metadata"].get("namespace")


def containers(objects: list[Object]) -> list[Object]:
    """Of every DaemonSet."""
    found: list[Object] = []
    for made in objects:
        if made["kind"] == "DaemonSet":
            found += made["spec"]["template"]["spec"]["containers"]
    return found


def merge(base: Object, patch: Object) -> None:
    """Kubernetes' strategic merge: lists of objects by mountPath or name, other lists as a whole."""
    for key, value in patch.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            merge(base[key], value)
        elif isinstance(value, list) and isinstance(base.get(key), list) and isinstance(value[0], dict):
            base[key] = _merged(base[key], value)
        else:
            base[key] = value


def _merged(base: list[Object], patch: list[Object]) -> list[Object]:
    """What the patch names comes first, in its order."""
    by = "mountPath" if "mountPath" in patch[0] else "name"
    rest = {one[by]: one for one in base}
    first = []
    for one in patch:
        same = rest.pop(one[by], None)
        if same is not None:
            merge(same, one)
        first.append(same or one)
    return [*first, *rest.values()]
