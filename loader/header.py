"""abi.py → the text of bpf/abi.h. `python -m loader.header --write` renews it, `--check` fails when it is stale.

Implicit padding is refused: C and ctypes would agree today and a new field could silently change a map's meaning.
"""

from __future__ import annotations

import ctypes as ct
import re
import sys
from enum import IntEnum
from pathlib import Path
from typing import Any

from loader import abi
from meshbpf.reason import KERNEL_REASONS, Reason

PATH = Path(__file__).resolve().parent.parent / "bpf" / "abi.h"
C_TYPES: dict[Any, str] = {abi.u8: "u8", abi.u16: "u16", abi.u32: "u32", abi.u64: "u64", abi.be16: "__be16"}


def snake(name: str) -> str:
    return re.sub(r"(?<!^)(?=[A-Z])", "_", name).lower()


def declare(kind: Any, name: str) -> str:
    """One C field declaration. Raises TypeError for a type that C_TYPES does not know."""
    if kind in C_TYPES:
        return f"{C_TYPES[kind]} {name}"
    if isinstance(kind, type) and issubclass(kind, ct.Array):
        return f"{C_TYPES[kind._type_]} {name}[{kind._length_}]"
    if isinstance(kind, type) and issubclass(kind, ct.Structure):
        return f"struct {snake(kind.__name__)} {name}"
    raise TypeError(f"{name}: {kind} has no C type")


def struct_text(struct: type[ct.Structure]) -> str:
    """The C struct. Raises TypeError when the compiler would insert padding."""
    lines, offset = [], 0
    for field in struct._fields_:
        name, kind = field[0], field[1]
        if getattr(struct, name).offset != offset:
            raise TypeError(f"{struct.__name__}.{name}: implicit padding before it")
        offset += ct.sizeof(kind)
        lines.append(f"\t{declare(kind, name)};")
    if offset != ct.sizeof(struct):
        raise TypeError(f"{struct.__name__}: implicit padding at its end")
    name = snake(struct.__name__)
    body = "\n".join(lines)
    return f'struct {name} {{\n{body}\n}};\n_Static_assert(sizeof(struct {name}) == {offset}, "{name}");\n'


def enum_text(enum: type[IntEnum]) -> str:
    prefix = snake(enum.__name__).upper()
    body = "\n".join(
        f"\t{prefix}_{member.name} = {member.value},"
        for member in enum
        if enum is not Reason or member < KERNEL_REASONS
    )
    return f"enum {snake(enum.__name__)} {{\n{body}\n}};\n"


def text() -> str:
    parts = [
        "/* SPDX-License-Identifier: BSD-3-Clause OR GPL-2.0-only */\n"
        "/* GENERATED from loader/abi.py by `make abi`: do not edit. */\n",
        "\n".join(f"#define {name} {value}" for name, value in abi.CONSTANTS.items()) + "\n",
        *(enum_text(enum) for enum in abi.ENUMS),
        *(struct_text(struct) for struct in abi.STRUCTS),
    ]
    return "\n".join(parts)


def main(arguments: list[str]) -> int:
    if arguments == ["--write"]:
        PATH.write_text(text())
        return 0
    if arguments == ["--check"]:
        if PATH.read_text() == text():
            return 0
        print("bpf/abi.h is stale: run `make abi`", file=sys.stderr)
        return 1
    print("usage: python -m loader.header --write | --check", file=sys.stderr)
    return 2


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
