"""What the service manager hears, and that nobody else is bothered."""

from __future__ import annotations

import socket
from pathlib import Path

import pytest

from meshbpf.runtime import notify


@pytest.mark.parametrize("abstract", [False, True])
def test_the_manager_hears_it(abstract: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = f"{tmp_path}/notify"
    monkeypatch.setenv("NOTIFY_SOCKET", f"@{name}" if abstract else name)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(f"\0{name}" if abstract else name)
        manager.settimeout(5)
        notify.tell(notify.READY)
        assert manager.recv(64) == b"READY=1"


def test_without_a_manager_nothing_is_said(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.delenv("NOTIFY_SOCKET", raising=False)
    notify.tell(notify.READY)
    assert not caplog.records


def test_a_manager_that_is_gone_is_logged(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", "/nonexistent/notify")
    notify.tell(notify.STOPPING)
    assert "service manager not told state=STOPPING=1" in caplog.text
