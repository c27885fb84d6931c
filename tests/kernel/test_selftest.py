"""The self-test: passes on the kernels we are made for, fails when it should, remembers, and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from loader import blocking, environment, leftovers, selftest, trials
from loader.instance import BPFFS, Instance
from loader.rig import Rig
from tests.support.machine import ROOT, until


def left_behind() -> list[str]:
    folders = (BPFFS / "meshbpf", environment.cgroup2())
    return [str(path) for folder in folders for path in folder.glob(f"selftest-{os.getpid()}")]


def left_by(name: str) -> list[Path]:
    return [path for path in (Instance(name).pins, Instance(name).run, environment.cgroup2() / name) if path.exists()]


def started() -> subprocess.Popen[bytes]:
    """A self-test in a process of its own, stopped in the middle of its trials."""
    code = "from loader import selftest; selftest.run()"
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stderr=subprocess.DEVNULL)
    procs = environment.cgroup2() / f"selftest-{process.pid}" / "cgroup.procs"
    until(lambda: procs.exists() and procs.read_text(), "the trials run")
    process.send_signal(signal.SIGSTOP)
    return process


def test_a_self_test_ended_by_sigterm_leaves_nothing() -> None:
    process = started()
    process.terminate()
    process.send_signal(signal.SIGCONT)
    assert process.wait(20) == 128 + signal.SIGTERM
    assert left_by(f"selftest-{process.pid}") == []


def test_what_a_killed_one_left_is_swept_and_a_living_one_s_is_not() -> None:
    dead, living = started(), started()
    dead.kill()
    dead.wait()
    gone, there = f"selftest-{dead.pid}", f"selftest-{living.pid}"
    assert len(left_by(gone)) == 3
    try:
        until(lambda: leftovers.sweep() or not left_by(gone), "swept once its trials have ended")
        assert left_by(gone) == []
        assert len(left_by(there)) == 3
    finally:
        living.send_signal(signal.SIGCONT)
        assert living.wait(60) == 0
    assert left_by(there) == []


def test_nobody_else_s_is_swept() -> None:
    other = environment.cgroup2() / "selftest-x9"
    other.mkdir()
    try:
        leftovers.sweep()
        assert other.exists()
    finally:
        other.rmdir()


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
