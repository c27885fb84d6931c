"""What this kernel does with a redirect, tried on small real connections before anybody's are touched (promise 5).

Every trial has a control: the same without our rules. A control that is wrong by construction must be seen to be wrong,
or the trial sees nothing; one that is wrong only on some kernels is reported. The trials run in a child of their own
(`python -m loader.selftest NAME`), which enters a cgroup of its own; nothing is left. About two seconds, most of it
compiling; `redirect_supported` remembers the verdict for as long as kernel and layout stay the same.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from loader import abi, btf, leftovers, trials
from loader.instance import Instance
from loader.rig import MESH, Rig
from loader.source import BPF
from meshbpf.errors import DataplaneError, EnvironmentLack, MeshError

SECONDS = 60.0  # an emulated machine takes a quarter of that
OFF = "none needed: connections go by plain TCP through the proxy (acceleration: off says so explicitly)"


@dataclass(frozen=True, slots=True)
class Check:
    """One row of `meshbpf check`. `detail` says what was seen, `remedy` what to do when `ok` is False."""

    id: str
    ok: bool
    detail: str
    remedy: str = ""


def run(name: str = "") -> tuple[Check, ...]:
    """The whole matrix on this kernel, now. Raises EnvironmentLack when this machine cannot attach at all."""
    try:
        btf.redirect_defines()
    except EnvironmentLack as error:
        return (Check("kernel", False, error.what, error.remedy),)
    leftovers.sweep()
    rig = Rig(name or f"selftest-{os.getpid()}")
    with _ends_by_exception(), rig.instance.lock():
        try:
            rig.start()
            lack = rig.instance.read_state().get("redirectLack", "")
            if lack:
                return (Check("load", False, lack.strip().splitlines()[-1], OFF),)
            return _in_child(rig)
        finally:
            rig.close()


@contextlib.contextmanager
def _ends_by_exception() -> Iterator[None]:
    """Within: SIGTERM takes the way of Ctrl-C, past everything that cleans up. Other threads get no signals."""
    if threading.current_thread() is not threading.main_thread() or signal.getsignal(signal.SIGTERM) != signal.SIG_DFL:
        yield
        return

    def end(number: int, _frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # once is enough: the second would end the cleaning up
        raise SystemExit(128 + number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _in_child(rig: Rig) -> tuple[Check, ...]:
    try:
        child = subprocess.run(
            [sys.executable, "-P", "-m", "loader.selftest", rig.instance.name],
            capture_output=True,
            text=True,
            check=False,
            timeout=SECONDS,
            env={**os.environ, "PYTHONPATH": str(BPF.parent)},
        )
        return tuple(Check(**row) for row in json.loads(child.stdout.splitlines()[-1]))
    except subprocess.TimeoutExpired:
        return (Check("self-test", False, f"not done within {SECONDS:.0f} s: a trial hangs on this kernel", OFF),)
    except (ValueError, IndexError):
        words = child.stderr.strip().splitlines() or [f"ended with {child.returncode}"]
        return (Check("self-test", False, words[-1], OFF),)


def attempt(trial: trials.Trial, rig: Rig) -> Check:
    """One trial and its control."""
    name = trial.ours.__name__.replace("_", "-")
    right, seen = _look(trial.ours, rig)
    wrong, control = _look(trial.control, rig)
    detail = f"{seen}; without the rules: {control}"
    if not right:
        return Check(name, False, detail, OFF)
    if not wrong and trial.must_fail:
        return Check(name, False, f"{detail}: the control was not seen to fail, so this trial proves nothing", OFF)
    return Check(name, True, detail)


def _look(part: Callable[[Rig], tuple[bool, str]], rig: Rig) -> tuple[bool, str]:
    try:
        return part(rig)
    except (OSError, AssertionError, MeshError) as error:
        return False, f"{type(error).__name__}: {error}"


def main(name: str) -> int:
    rig = Rig(name)
    rig.enter()
    try:
        rig.serve()
        print(json.dumps([asdict(attempt(trial, rig)) for trial in trials.TRIALS]))
    finally:
        rig.finish()
    return 0


def _kernel() -> str:
    """What a verdict is about: this kernel, these offsets, these layouts and texts."""
    uname = os.uname()
    texts = sum(path.stat().st_mtime_ns for path in BPF.rglob("*.[ch]"))
    return f"{uname.release} {uname.version} {abi.layout(MESH.agent.maps)} {texts}"


def redirect_supported(instance: Instance) -> tuple[bool, str]:
    """Whether `acceleration: auto` may redirect here, and if not, why. Kept in the instance's run directory."""
    leftovers.sweep()
    path, kernel = instance.run / "selftest.json", _kernel()
    try:
        kept = json.loads(path.read_text())
        if kept["kernel"] == kernel:
            return bool(kept["ok"]), str(kept["reason"])
    except (FileNotFoundError, ValueError, KeyError):
        pass  # never tried, or written by another version: try
    try:
        failed = [check for check in run() if not check.ok]
    except (EnvironmentLack, DataplaneError, PermissionError) as error:  # who is not root may make no cgroup
        return False, str(error)
    reason = "; ".join(f"{check.id}: {check.detail}" for check in failed)
    if instance.run.is_dir():
        staged = path.with_suffix(".new")
        staged.write_text(json.dumps({"kernel": kernel, "ok": not failed, "reason": reason}))
        staged.chmod(0o600)
        staged.replace(path)
    return not failed, reason


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1]))
