"""Paths to a mesh: which files count, what cannot be read, and the examples that people copy."""

from __future__ import annotations

from pathlib import Path

import pytest

from meshbpf import yamlpos
from meshbpf.carrier import Carrier, choose
from meshbpf.errors import ConfigError
from meshbpf.model import Agent, Mesh
from meshbpf.schema import ConfigErrors
from meshbpf.schema.files import files, is_configuration, load, may_size_tables, texts

EXAMPLES = Path(__file__).parents[2] / "examples"
PORTS = "spec: {ports: [{name: http, port: 80}]}"


def service(name: str) -> str:
    return f"apiVersion: meshbpf.io/v1\nkind: Service\nmetadata: {{name: {name}}}\n{PORTS}\n"


def test_a_directory_is_its_configuration_files_in_order(tmp_path: Path) -> None:
    for name in ("b.yaml", "a.yml", "c.json", ".hidden.yaml", "#a.yaml", ".#a.yaml", "a~.yaml", "a.yaml~", "a.txt"):
        (tmp_path / name).write_text("")
    (tmp_path / "deeper.yaml").mkdir()
    assert [file.name for file in files(tmp_path)] == ["a.yml", "b.yaml", "c.json"]
    assert not is_configuration("a.yaml.swp")


def test_load_joins_all_paths(tmp_path: Path) -> None:
    (tmp_path / "dir").mkdir()
    (tmp_path / "dir" / "a.yaml").write_text(service("a"))
    # A file that is named has any name; what is named twice is read once.
    (tmp_path / "b").write_bytes(b"\xef\xbb\xbf" + service("b").encode().replace(b"\n", b"\r\n"))
    (tmp_path / "link").symlink_to("b")
    mesh = load([tmp_path / "dir", tmp_path / "b", tmp_path / "link", tmp_path / "dir" / "a.yaml"])
    assert [service.name for service in mesh.services] == ["a", "b"]
    assert mesh.services[1].source == f"{tmp_path}/b:3:18"
    assert mesh.agent == Agent()


def test_an_empty_directory_is_an_empty_mesh(tmp_path: Path) -> None:
    assert load([tmp_path]) == Mesh()


def test_what_cannot_be_read_is_named_together(tmp_path: Path) -> None:
    (tmp_path / "loop.yaml").symlink_to("loop.yaml")
    (tmp_path / "gone.yaml").symlink_to("nowhere")
    with pytest.raises(ConfigErrors) as caught:
        texts([tmp_path / "missing.yaml", tmp_path / "gone.yaml"])
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/missing.yaml: cannot be read: No such file or directory",
        f"{tmp_path}/gone.yaml: cannot be read: No such file or directory",
    ]
    with pytest.raises(ConfigError, match=r"gone\.yaml: cannot be read: No such file or directory"):
        load([tmp_path])
    with pytest.raises(ConfigError, match=r"loop\.yaml: cannot be read: Too many levels of symbolic links"):
        load([tmp_path / "loop.yaml"])


def test_a_file_in_another_encoding_is_told_where(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes("a: 1\n# café\n".encode("latin-1"))
    with pytest.raises(ConfigError) as caught:
        load([path])
    assert str(caught.value) == f"{path}:2:6: not UTF-8: save the file in that encoding"


def test_a_file_that_is_too_large_is_not_read_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(yamlpos, "MAX_BYTES", 10)
    path = tmp_path / "large.yaml"
    path.write_text("é" * 5000)
    with pytest.raises(ConfigError, match=r"large\.yaml:1:1: too large: \d+ bytes, at most 10 are read"):
        load([path])


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: str(path.name))
def test_every_example_is_valid(path: Path) -> None:
    assert load([path]).services


def test_the_shop_is_what_its_comments_say() -> None:
    mesh = load([EXAMPLES / "shop.yaml"])
    ledger, orders = mesh.services
    assert (orders.label, orders.addresses, orders.ports[0].port) == ("orders", ("127.96.0.10",), 80)
    assert [(e.address, e.ports["http"]) for e in orders.endpoints] == [("127.0.0.1", 8081), ("127.0.0.1", 8082)]
    assert choose(orders.ports[0], mesh.policy_for(orders)).carrier is Carrier.PROXY
    assert choose(ledger.ports[0], mesh.policy_for(ledger)).carrier is Carrier.DIRECT


def test_who_never_says_maps_cannot_size_tables() -> None:
    agent = "apiVersion: meshbpf.io/v1\nkind: Agent\nspec: {maps: {slots: 7}}\n"
    assert may_size_tables([("a", service("a")), ("b", agent)])
    assert not may_size_tables([("a", service("a"))])
