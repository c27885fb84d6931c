"""bpf/*.c → the one text that bcc compiles. bcc rewrites its main file only, so quoted includes are inlined, once each.

`#line` keeps compiler errors at the file and line a person knows. Pure but for reading the files.
"""

from __future__ import annotations

import re
from pathlib import Path

BPF = Path(__file__).resolve().parent.parent / "bpf"
INCLUDE = re.compile(r'\s*#\s*include\s+"([^"]+)"')


def text(main: str = "meshbpf.c", root: Path = BPF) -> str:
    """The inlined source. Raises FileNotFoundError for an include that is not below `root`."""
    seen: set[str] = set()
    return "".join(_inline(main, root, seen))


def _inline(name: str, root: Path, seen: set[str]) -> list[str]:
    if name in seen:
        return []
    seen.add(name)
    lines = [f'#line 1 "bpf/{name}"\n']
    for number, line in enumerate((root / name).read_text().splitlines(keepends=True), start=1):
        match = INCLUDE.match(line)
        if match is None:
            lines.append("\n" if line.startswith("#pragma once") else line)
            continue
        lines += _inline(match.group(1), root, seen)
        lines.append(f'#line {number + 1} "bpf/{name}"\n')
    return lines
