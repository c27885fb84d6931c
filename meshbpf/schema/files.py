"""Paths to text: the only I/O of the schema, for `validate`, `attach` and the file source.

Rules: a directory means its *.yaml, *.yml and *.json, sorted, not deeper; hidden files and editors' leftovers are no
configuration; a file that is named twice is read once; whatever cannot be read is a `ConfigError` that names it.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from meshbpf import yamlpos
from meshbpf.errors import ConfigError
from meshbpf.model import Agent, Mesh
from meshbpf.schema import parse
from meshbpf.schema.report import ConfigErrors

SUFFIXES = (".yaml", ".yml", ".json")


def load(paths: Sequence[Path]) -> Mesh:
    """The mesh of these files alone; a service without addresses still has none (`registry.merge` gives it one).

    Raises `ConfigErrors` with every fault.
    """
    parsed = parse(texts(paths))
    policies = {policy.service_id: policy for policy in parsed.policies}
    return Mesh(parsed.agent or Agent(), parsed.services, policies)


def texts(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """(file, text) of everything under `paths`. Raises `ConfigErrors` when something cannot be read."""
    errors: list[ConfigError] = []
    found: dict[str, tuple[str, str]] = {}
    for path in paths:
        try:
            for file in files(path):
                found.setdefault(os.path.realpath(file), (str(file), _text(file)))
        except ConfigError as error:
            errors.append(error)
    if errors:
        raise ConfigErrors(errors)
    return list(found.values())


def may_size_tables(texts: Sequence[tuple[str, str]]) -> bool:
    """Whether a file may say how large the tables are: a guess, before anybody makes sense of them."""
    return any("maps" in text for _file, text in texts)


def files(path: Path) -> list[Path]:
    """The configuration files that `path` names: itself, or those of the directory."""
    try:
        if not path.is_dir():
            return [path]
        return sorted(entry for entry in path.iterdir() if is_configuration(entry.name) and not entry.is_dir())
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error


def is_configuration(name: str) -> bool:
    """Whether a name inside a directory is one of ours (`.#a.yaml`, `#a.yaml`, `a~.yaml` are editors' leftovers)."""
    return name.endswith(SUFFIXES) and not name.startswith((".", "#")) and not name.partition(".")[0].endswith("~")


def _text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(yamlpos.MAX_BYTES + 1)
    except OSError as error:
        raise ConfigError(str(path), f"cannot be read: {error.strerror}") from error
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        if len(data) > yamlpos.MAX_BYTES:  # cut inside a character; `parse` says that it is too large
            return data.decode("utf-8", "replace")
        before = data[: error.start].decode("utf-8")
        line, column = before.count("\n") + 1, len(before) - (before.rfind("\n") + 1) + 1
        raise ConfigError(f"{path}:{line}:{column}", "not UTF-8: save the file in that encoding") from error
