"""Every verdict has a name, every name a text, and every reason of the kernel a place where it falls."""

from __future__ import annotations

import re

from loader.source import BPF
from meshbpf.reason import KERNEL_REASONS, TEXT, Reason


def test_every_reason_is_spelled_out_once() -> None:
    assert set(TEXT) == set(Reason)
    assert len(set(TEXT.values())) == len(TEXT)
    for reason, text in TEXT.items():
        assert text, reason
        assert not text.endswith("."), reason


def test_words_are_fit_for_labels_and_numbers_are_unique() -> None:
    assert all(re.fullmatch(r"[a-z][a-z0-9_]*", reason.word) for reason in Reason)
    assert len(Reason.__members__) == len({int(reason) for reason in Reason})


def test_the_kernel_s_reasons_fit_its_counters() -> None:
    assert all(int(reason) >= 0 for reason in Reason)
    kernel = [reason for reason in Reason if reason < KERNEL_REASONS]
    assert sorted(kernel) == list(range(len(kernel))), "no holes: each is a counter"


def test_every_kernel_reason_falls_somewhere() -> None:
    """In a program, or in the loader, which has the command program count what it found out itself."""
    sources = [path for path in BPF.rglob("*") if path.suffix in (".c", ".h") and path.name != "abi.h"]
    text = "\n".join(path.read_text() for path in sources)
    used = {Reason[name] for name in re.findall(r"\bREASON_([A-Z0-9_]+)\b", text) if name != "STRIDE"}
    told = re.findall(r"Op\.REFUSE, reason=Reason\.([A-Z0-9_]+)", (BPF.parent / "loader" / "redirect.py").read_text())
    assert used | {Reason[name] for name in told} == {reason for reason in Reason if reason < KERNEL_REASONS}
