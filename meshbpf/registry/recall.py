"""The last good answer of a followed registry, in a file: an agent that starts while the registry is away knows it.

Otherwise the restart of an agent would take away what the registry's absence alone does not. A file that cannot be
written or read only costs that, so it is logged and nothing else.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

log = logging.getLogger("registry")


def place(store: str, url: str) -> Path:
    """Beside the store of our own registry: a directory that is ours to write, and that outlives a boot."""
    host = url.removeprefix("http://").translate(str.maketrans(":[]", "-  ")).replace(" ", "")
    return Path(f"{store}.{host}.json")


def read(path: Path) -> Mapping[str, Any] | None:
    """What `write` was given; None when there is nothing of use."""
    try:
        answer = json.loads(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError, RecursionError) as error:
        log.warning("the last answer of a registry cannot be recalled path=%s error=%s", path, error)
        return None
    return answer if isinstance(answer, dict) else None


def write(path: Path, answer: Mapping[str, Any]) -> str:
    """In one step. Why it could not be; empty when it could."""
    staged = path.with_name(path.name + ".new")
    try:
        with open(os.open(staged, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write(json.dumps(answer, separators=(",", ":")))  # `dump` is many times slower
        staged.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):  # it may never have been there
            staged.unlink()
        return str(error)
    return ""
