"""Texts read piece by piece: the same as read whole, and what is still there as it was is the same object."""

from __future__ import annotations

import json

import pytest

from meshbpf import yamlpos
from meshbpf.schema import ConfigErrors, Known, _parse, parse, pieces

SERVICE = """\
apiVersion: meshbpf.io/v1
kind: Service
metadata: {{name: {name}}}
spec:
  addresses: [127.96.0.{number}]
  ports: [{{name: main, port: 80}}]
  endpoints:
    - {{address: 192.0.2.1, ports: {{main: {port}}}}}
"""


def service(name: str, port: int = 8080) -> str:
    return SERVICE.format(name=name, number=ord(name), port=port)


def test_a_text_is_cut_where_its_documents_begin() -> None:
    assert pieces.cut("a: 1\n---\nb: 2\n--- \t\n\n---\n# c\n--- d\n  ---\nx---\n") == [
        ("a: 1\n", 1),
        ("b: 2\n", 3),
        ("# c\n--- d\n  ---\nx---\n", 7),
    ]
    assert pieces.cut("") == pieces.cut("---\n\n") == []


@pytest.mark.parametrize(
    "text",
    ["%YAML 1.2\n---\na: 1\n---\n", "a: 1\n...\n---\nb: 2\n", "a: 1\n...\n%TAG ! !b\n---\nb: 2\n",
     "a: 1\r\n---\r\nb: 2\n", "a: \u2028b\n---\nc: 1\n", "a: \u0085b\n---\nc: 1\n",
     "\ufeffa: 1\n---\nb: 2\n", "a: 1\n---\n\ufeffb: 2\n"],
)  # fmt: skip
def test_a_text_whose_pieces_may_mean_something_else_stays_whole(text: str) -> None:
    assert pieces.cut(text) == [(text, 1)]


def test_a_text_that_is_too_large_stays_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamlpos, "MAX_BYTES", 12)
    assert len(pieces.cut("a\n---\nb\n---\n")) == 2
    assert len(pieces.cut("a\n---\nb\n---\n ")) == len(pieces.cut("é\n---\nb")) == 1


@pytest.mark.parametrize(
    "text",
    [service("a") + "---\n" + service("b"),
     "---\n---\n" + service("a") + "--- # b\n" + service("b") + "---",
     "# a & b\n" + service("a") + "---\n- |\n a\n---\n" + service("b"),
     service("a") + "---\nx: 'y\n---\nz'\n",
     service("a") + "---\nx: {y: [\n---\n" + service("b"),
     service("a").replace("addresses:", "labels: &x {}\n  addresses:") + "---\n" + service("b").replace("main:", "*x:"),
     "metadata: &x {name: a}\n---\nmetadata: *x\n"],
)  # fmt: skip
def test_pieces_say_what_the_whole_says(text: str) -> None:
    def outcome(quick: bool) -> object:
        try:
            return _parse([("f", text)], quick=quick)
        except ConfigErrors as errors:
            return None if quick else str(errors)  # then the careful reader has the word

    careful = outcome(quick=False)
    assert outcome(quick=True) == (None if isinstance(careful, str) else careful)


def test_what_is_still_there_as_it_was_is_the_same_object() -> None:
    known: Known = {}
    inside = {"addresses": ["127.96.0.9"], "ports": [{"name": "main", "port": 80}]}
    last = {"kind": "Service", "apiVersion": "meshbpf.io/v1", "metadata": {"name": "c"}, "spec": inside}
    texts = [service("a"), service("b"), json.dumps(last) + "\n"]
    before = parse([("f", "---\n".join(texts))], known).services
    texts[1] = service("b", port=8081)
    after = parse([("f", "---\n".join(texts))], known).services
    assert [old is new for old, new in zip(before, after, strict=True)] == [True, False, True]
    assert after[1].endpoints[0].ports["main"] == 8081
    assert list(known) == [("f", 1, texts[0]), ("f", 10, texts[1]), ("f", 19, texts[2])]


def test_what_has_moved_says_where_it_is_now() -> None:
    known: Known = {}
    parse([("f", service("a") + "---\n" + service("b"))], known)
    (_, moved) = parse([("f", service("a") + "# longer\n---\n" + service("b"))], known).services
    assert (moved.source, moved.endpoints[0].source) == ("f:13:18", "f:18:7")


def test_a_fault_forgets_nothing() -> None:
    known: Known = {}
    (before,) = parse([("f", service("a"))], known).services
    with pytest.raises(ConfigErrors, match="f:10:1: "):
        parse([("f", service("a") + "---\nkind\n")], known)
    assert parse([("f", service("a"))], known).services[0] is before


def test_aliases_may_not_repeat_more_in_many_pieces_than_in_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def aliased(name: str) -> str:
        return service(name).replace(f"{{name: {name}}}", f"{{name: {name}, labels: &l {{a: b, c: d}}}}").replace(
            "{address: 192.0.2.1,", "{address: 192.0.2.1, labels: *l,"
        )  # fmt: skip

    known: Known = {}
    text = aliased("a") + "---\n" + aliased("b")
    assert len(parse([("f", text)], known).services) == 2
    assert not known  # who is not read again does not count
    monkeypatch.setattr(yamlpos, "MAX_REPEATED", 5)
    assert len(parse([("f", aliased("a"))]).services) == 1
    with pytest.raises(ConfigErrors, match="aliases repeat more than 5 values"):
        parse([("f", text)])
