"""Links of our Markdown files: the file exists, and so does a heading that is named. Foreign hosts are not called.

`python tests/tools/links.py` prints `file:line: message` for each broken link and exits 1 when there is one.
"""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.parse import unquote

ROOT = Path(__file__).resolve().parents[2]
LINK = re.compile(r"!?\[[^\]]*\]\(\s*<?([^)>\s]+)>?[^)]*\)|^\s*\[[^\]]+\]:\s*(\S+)")
CODE = re.compile(r"`[^`]*`")
FENCE = re.compile(r"^\s*(```|~~~)")


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """The numbered lines that are not inside a fenced block."""
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        if FENCE.match(line):
            fenced = not fenced
        elif not fenced:
            yield number, line


@cache
def anchors(path: Path) -> frozenset[str]:
    """The heading anchors of one file, made as code hosts make them: a repeated heading gets -1, -2, …"""
    found: set[str] = set()
    for _, line in prose(path):
        if not (heading := re.match(r"#{1,6}\s+(.*?)\s*#*$", line)):
            continue
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading[1])
        base = slug = re.sub(r"[^\w\- ]", "", text.lower()).replace(" ", "-")
        repeat = 0
        while slug in found:
            repeat += 1
            slug = f"{base}-{repeat}"
        found.add(slug)
    return frozenset(found)


def problem(source: Path, target: str, root: Path) -> str | None:
    """Why the link `target` in `source` is broken, or None."""
    if re.match(r"[a-z][a-z0-9+.-]*:", target, re.I):
        return None
    name, _, anchor = target.partition("#")
    path = (source.parent / unquote(name)).resolve() if name else source
    if name.startswith("/") or not path.is_relative_to(root):
        return f"{target}: leaves the repository"
    if not path.exists():
        return f"{target}: no such file"
    if anchor and path.suffix == ".md" and anchor.lower() not in anchors(path):
        return f"{target}: no such heading"
    return None


def broken(files: list[Path], root: Path) -> Iterator[str]:
    for path in files:
        for number, line in prose(path):
            for match in LINK.finditer(CODE.sub("", line)):
                if why := problem(path, match[1] or match[2], root):
                    yield f"{path.relative_to(root)}:{number}: {why}"


def tracked(root: Path) -> list[Path]:
    names = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", "*.md"],
        cwd=root,
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [root / name for name in sorted(set(names.split("\0"))) if name and (root / name).exists()]


if __name__ == "__main__":
    lines = list(broken(tracked(ROOT), ROOT))
    print("\n".join(lines) or "links: all well", file=sys.stderr if lines else sys.stdout)
    sys.exit(bool(lines))
