"""links.py finds what is broken and leaves the rest alone."""

import importlib.util
from pathlib import Path

SPEC = importlib.util.spec_from_file_location("links", Path(__file__).with_name("links.py"))
assert SPEC and SPEC.loader
links = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(links)


def test_broken_links_are_named_with_file_and_line(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("# Two words, `code`\n# Same\n# Same\n")
    page = tmp_path / "a.md"
    page.write_text(
        "# Top\n"
        "[ok](b.md) [ok](b.md#two-words-code) [ok](b.md#same-1) [ok](#top) [ok](https://example.org/x)\n"
        "[gone](none.md)\n"
        "![gone](none.png)\n"
        "[gone](b.md#three)\n"
        "[out](/etc/passwd) [out](../up.md)\n"
        "```\n[fenced](none.md)\n```\n"
        "[ref]: none.md\n`[code](none.md)`\n"
    )
    found = [line.split(": ")[0] + " " + line.rsplit(": ", 1)[1] for line in links.broken([page], tmp_path)]
    assert found == [
        "a.md:3 no such file",
        "a.md:4 no such file",
        "a.md:5 no such heading",
        "a.md:6 leaves the repository",
        "a.md:6 leaves the repository",
        "a.md:10 no such file",
    ]
