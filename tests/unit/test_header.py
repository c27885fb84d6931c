"""bpf/abi.h from loader/abi.py: what it says, and what it refuses."""

from __future__ import annotations

import ctypes as ct
from enum import IntEnum
from pathlib import Path

import pytest

from loader import abi, header
from meshbpf.reason import KERNEL_REASONS, Reason


def test_the_header_in_the_tree_is_fresh() -> None:
    assert header.PATH.read_text() == header.text(), "run `make abi`"


def test_a_struct() -> None:
    class SmallThing(ct.Structure):
        _fields_ = [("port", abi.be16), ("pad", abi.u16), ("address", abi.Address), ("inner", abi.SlotKey)]

    assert header.struct_text(SmallThing) == (
        "struct small_thing {\n\t__be16 port;\n\tu16 pad;\n\tu8 address[16];\n\tstruct slot_key inner;\n};\n"
        '_Static_assert(sizeof(struct small_thing) == 28, "small_thing");\n'
    )


def test_implicit_padding_is_refused() -> None:
    class Between(ct.Structure):
        _fields_ = [("a", abi.u8), ("b", abi.u32)]

    class AtTheEnd(ct.Structure):
        _fields_ = [("a", abi.u32), ("b", abi.u8)]

    with pytest.raises(TypeError, match=r"Between\.b: implicit padding before it"):
        header.struct_text(Between)
    with pytest.raises(TypeError, match="AtTheEnd: implicit padding at its end"):
        header.struct_text(AtTheEnd)


def test_a_type_without_a_c_name_is_refused() -> None:
    with pytest.raises(TypeError, match="ratio"):
        header.declare(ct.c_double, "ratio")


def test_an_enum() -> None:
    class Both(IntEnum):
        ONE = 1
        TWO_WORDS = 5

    assert header.enum_text(Both) == "enum both {\n\tBOTH_ONE = 1,\n\tBOTH_TWO_WORDS = 5,\n};\n"


def test_the_kernel_is_told_its_own_reasons_only() -> None:
    text = header.enum_text(Reason)
    for reason in Reason:
        assert (f"REASON_{reason.name} = {reason.value},\n" in text) == (reason < KERNEL_REASONS)


def test_command_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(header, "PATH", tmp_path / "abi.h")
    assert header.main(["--write"]) == 0
    assert header.main(["--check"]) == 0
    header.PATH.write_text(header.text() + "\n")
    assert header.main(["--check"]) == 1
    assert "make abi" in capsys.readouterr().err
    assert header.main([]) == 2
