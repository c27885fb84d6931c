"""The self-test: passes on the kernels we are made for, fails when it should, remembers, and leaves nothing."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader import blocking, environment, selftest, trials
from loader.instance import BPFFS, Instance
from loader.rig import Rig


def left_behind() -> list[str]:
    return [str(path) for folder in (BPFFS / "meshbpf", environment.cgroup2()) for path in folder.glob("selftest-*")]


def test_the_matrix_is_green_and_nothing_is_left() -> None:
    checks = selftest.run()
    assert [check for check in checks if not check.ok] == []
    assert {check.id for check in checks} >= {"order", "credit", "fionread", "splice", "unread-entry", "missing-target"}
    assert left_behind() == []


@pytest.mark.parametrize("trial", [trials.credit, trials.missing_target])
def test_a_kernel_without_our_rules_would_be_caught(rig: Rig, trial: object) -> None:
    """The trials themselves, run while every member redirects whatever it sends."""
    with rig.naive():
        check = selftest.attempt(trials.Trial(trial, trials.missing_target_control, True), rig)  # type: ignore[arg-type]
    assert not check.ok
    assert check.remedy


def test_a_control_that_does_not_fail_is_no_control(rig: Rig) -> None:
    check = selftest.attempt(trials.Trial(blocking.reset, lambda rig: (False, "fine"), True), rig)
    assert not check.ok
    assert "proves nothing" in check.detail


def test_a_trial_that_cannot_run_is_a_failed_one(rig: Rig) -> None:
    def broken(rig: Rig) -> trials.Seen:
        raise ConnectionResetError(104, "Connection reset by peer")

    check = selftest.attempt(trials.Trial(broken, trials.order_control, True), rig)
    assert not check.ok
    assert "ConnectionResetError" in check.detail


@pytest.fixture
def instance() -> Iterator[Instance]:
    made = Instance("selftest-kept")
    made.make_run()
    yield made
    shutil.rmtree(made.run)


def test_the_verdict_is_kept_for_this_kernel_only(instance: Instance, monkeypatch: pytest.MonkeyPatch) -> None:
    runs = []

    def run(name: str = "") -> tuple[selftest.Check, ...]:
        runs.append(name)
        return (selftest.Check("order", len(runs) > 1, "inverted"),)

    monkeypatch.setattr(selftest, "run", run)
    assert selftest.redirect_supported(instance) == (False, "order: inverted")
    assert selftest.redirect_supported(instance) == (False, "order: inverted")
    assert len(runs) == 1
    kept = Path(instance.run / "selftest.json")
    assert kept.stat().st_mode & 0o777 == 0o600
    kept.write_text(json.dumps({**json.loads(kept.read_text()), "kernel": "another"}))
    assert selftest.redirect_supported(instance) == (True, "")
    assert len(runs) == 2
