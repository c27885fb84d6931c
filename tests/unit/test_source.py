"""Inlining for bcc: each file once, every line where a person looks for it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from loader import source
from loader.compile import PROGRAMS


def where(text: str, wanted: str) -> str:
    """`file:line` that a compiler would name for the line."""
    file, number = "", 0
    for line in text.splitlines():
        if match := re.match(r'#line (\d+) "(.*)"', line):
            number, file = int(match.group(1)), match.group(2)
            continue
        if line == wanted:
            return f"{file}:{number}"
        number += 1
    raise AssertionError(f"{wanted!r} is not in the text")


def test_includes_are_inlined_once_and_lines_are_kept(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text('#include <linux/bpf.h>\n#include "a.h"\n#include "b.h"\nint main_line;\n')
    (tmp_path / "a.h").write_text("#pragma once\nint a_line;\n")
    (tmp_path / "b.h").write_text('/* b */\n  #  include "a.h"\nint b_line;\n')
    text = source.text("main.c", tmp_path)
    assert text.count("int a_line;") == 1
    assert "#include <linux/bpf.h>" in text
    assert "#pragma once" not in text
    assert [where(text, f"int {name}_line;") for name in ("main", "a", "b")] == [
        "bpf/main.c:4",
        "bpf/a.h:2",
        "bpf/b.h:3",
    ]


def test_a_missing_include_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "main.c").write_text('#include "none.h"\n')
    with pytest.raises(FileNotFoundError):
        source.text("main.c", tmp_path)


def test_every_program_is_in_the_one_text_at_its_own_line() -> None:
    text = source.text()
    for name in PROGRAMS:
        definition = next(line for line in text.splitlines() if re.match(rf"int {name}\(", line))
        file, number = where(text, definition).split(":")
        assert (source.BPF.parent / file).read_text().splitlines()[int(number) - 1] == definition


def test_no_include_is_left() -> None:
    assert not [line for line in source.text().splitlines() if source.INCLUDE.match(line)]
