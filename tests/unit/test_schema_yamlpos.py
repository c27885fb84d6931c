"""YAML with positions: values by YAML 1.2, every fault with line and column, and bounds that hold."""

from __future__ import annotations

import pytest

from meshbpf import yamlpos
from meshbpf.yamlpos import Map, Seq, read


def faults(text: str) -> list[str]:
    return [f"{fault.at.line}:{fault.at.column}: {fault.message}" for fault in read("f", text).faults]


@pytest.mark.parametrize(
    ("scalar", "value"),
    [
        ("off", "off"), ("yes", "yes"), ("true", True), ("False", False), ("~", None), ("", None), ("null", None),
        ("10", 10), ("010", 10), ("-3", -3), ("0x10", 16), ("0o17", 15), ("1.5", 1.5), (".5", 0.5), ("1e3", 1000.0),
        ("10:30", "10:30"), ("2024-01-01", "2024-01-01"), ("'10'", "10"), ('"true"', "true"), ("!!str 80", "80"),
        ("! 80", "80"), ("!!int 80", 80), (".inf", ".inf"), ("5s", "5s"), ("127.0.0.1", "127.0.0.1"),
    ],
)  # fmt: skip
def test_scalars_follow_yaml_1_2(scalar: str, value: object) -> None:
    (document,) = read("f", f"key: {scalar}\n").documents
    assert document.value == {"key": value}
    assert type(document.value["key"]) is type(value)


def test_every_key_and_value_knows_its_place() -> None:
    first, second = read("a.yaml", "# comment\nname: x\nitems:\n  - 1\n  - {deep: [y]}\n---\n- z\n").documents
    assert (str(first.at), str(second.at)) == ("a.yaml:2:1", "a.yaml:7:1")
    value = first.value
    assert isinstance(value, Map)
    assert {key: str(at) for key, at in value.keys_at.items()} == {"name": "a.yaml:2:1", "items": "a.yaml:3:1"}
    assert {key: str(at) for key, at in value.at.items()} == {"name": "a.yaml:2:7", "items": "a.yaml:4:3"}
    items = value["items"]
    assert isinstance(items, Seq)
    assert [str(at) for at in items.at] == ["a.yaml:4:5", "a.yaml:5:5"]
    assert str(items[1]["deep"].at[0]) == "a.yaml:5:13"


@pytest.mark.parametrize("text", ["", "# nothing\n", "---\n---\n", "\ufeff"])
def test_text_without_content(text: str) -> None:
    result = read("f", text)
    assert result.faults == []
    assert all(document.value is None for document in result.documents)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a: b: c", "1:5: not YAML: mapping values are not allowed in this context"),
        ("a:\n\tb: 1", "2:1: not YAML: a tab stands here, and YAML indents with spaces: write spaces"),
        ("b: {c: 1\n",
         "1:9: not YAML: did not find expected ',' or '}' while parsing a flow mapping that begins at line 1"),
        ("'b\n\n",
         "2:1: not YAML: found unexpected end of stream while scanning a quoted scalar that begins at line 1"),
        ("é: 1\na: \x07", "2:4: not YAML: control characters are not allowed"),
        ("a: \ud800", "1:4: not YAML: surrogates not allowed"),
        ("{1: 2}", "1:2: a key must be a string, got 1: quote it"),
        ("? [a]\n: 1", "1:3: a key must be a string, got a list or mapping"),
        ("a: &x [1]\n*x : 2", "2:1: a key must be a string, got a list or mapping"),
        ("a: !!binary abc", "1:4: the tag tag:yaml.org,2002:binary is not supported here: remove it"),
        ("a: !Ref {b: 1}", "1:4: the tag !Ref is not supported: remove it"),
        ("a: *x", "1:4: unknown alias *x: no &x before it"),
        ("a: &x 1\n---\nb: *x", "3:4: unknown alias *x: no &x before it"),
        ("a:\n- b\n\t  c: d", "3:1: not YAML: a tab stands here, and YAML indents with spaces: write spaces"),
        ("a: &x [*x]", "1:8: *x is inside its own anchor"),
        ("a: &x {b: 1}\nc:\n  <<: *x\n", "3:3: merge keys (<<) are not supported: write the fields out"),
    ],
)  # fmt: skip
def test_faults_have_a_place(text: str, expected: str) -> None:
    assert faults(text) == [expected]


def test_a_duplicate_key_is_a_fault_and_reading_goes_on() -> None:
    assert faults("a: 1\nb: 2\na: 3\nc: {d: 1, d: 2}\n") == [
        '3:1: duplicate key "a": first given at line 1',
        '4:11: duplicate key "d": first given at line 4',
    ]


def test_documents_before_a_fault_are_kept() -> None:
    result = read("f", "a: 1\n---\nb: [\n")
    assert [document.value for document in result.documents] == [{"a": 1}]
    assert len(result.faults) == 1


def test_an_alias_is_the_value_of_its_anchor() -> None:
    (document,) = read("f", "a: &x {b: 1}\nc: [*x, *x]\n").documents
    assert document.value == {"a": {"b": 1}, "c": [{"b": 1}, {"b": 1}]}


def test_what_aliases_repeat_is_bounded() -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]" for i in range(1, 9)]
    (fault,) = faults("\n".join(lines))
    assert fault.startswith("5:") and fault.endswith("aliases repeat more than 100000 values: write fewer aliases")


@pytest.mark.parametrize("opening", ["[", "- ", "{a: "])
def test_depth_is_bounded_however_deep_the_text(opening: str) -> None:
    """The C composer of PyYAML would exhaust the stack and kill the process."""
    (fault,) = faults(opening * 200_000)
    assert fault == f"1:{len(opening) * yamlpos.MAX_DEPTH + 1}: nested deeper than 64 levels"


def test_size_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamlpos, "MAX_BYTES", 10)
    assert faults("é" * 5) == []
    assert faults("é" * 6) == ["1:1: too large: 12 bytes, at most 10 are read: split the file"]
