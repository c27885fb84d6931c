"""`meshbpf maps`: its words are those of ARCHITECTURE.md, its tables those of bpf/maps.h."""

from __future__ import annotations

import re

from loader.source import BPF
from meshbpf.cli.maps import CATALOGUE, KINDS, Held, rows

SAID = (BPF.parent / "ARCHITECTURE.md").read_text()
DECLARED = re.findall(r'^TABLE\("(\w+)",[^;]*?, (\w+), \w+, [^,]*\);$', (BPF / "maps.h").read_text(), re.M)


def test_the_page_and_the_command_say_the_same() -> None:
    section = SAID.partition("## Tables")[2].partition("\n## ")[0]
    page = {
        name: (said, writer, reader)
        for name, said, writer, reader in re.findall(r"^\| `(\w+)` \| (.*?) \| (.*?) \| (.*?) \|$", section, re.M)
    }
    storage = {"socket storage", "ring"}
    ours = {
        name: (f"{about.key}{': ' if about.key in storage else ' → '}{about.value}", about.writer, about.reader)
        for name, about in CATALOGUE.items()
    }
    assert page == ours


def test_every_table_of_the_programs_is_there_and_its_kind_known() -> None:
    assert [name for _kind, name in DECLARED] == list(CATALOGUE)
    kinds = {name for name, _countable in KINDS.values()}
    assert {kind for kind, _name in DECLARED} - {"prog"} <= kinds


def test_rows() -> None:
    shown = rows(
        [
            Held("zebra", "type 99", None, 5, 0), Held("slots", "hash", 80, 100, 4096),
            Held("services", "hash", 1, 16384, 1), Held("agent", "array", None, 1, 8),
            Held("origins", "sk_storage", None, 0, 0), Held("flows", "lru_hash", 0, 10, 1),
        ]
    )  # fmt: skip
    assert [(row["name"], row["entries"], row["capacity"], row["full_percent"]) for row in shown] == [
        ("services", 1, 16384, 0.1), ("slots", 80, 100, 80.0), ("agent", None, None, None),
        ("origins", None, None, None), ("flows", 0, 10, 0.0), ("zebra", None, None, None),
    ]  # fmt: skip
    assert (shown[1]["writer"], shown[-1]["writer"]) == ("loader", "")
