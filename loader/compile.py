"""The one file that imports bcc. `python -m loader.compile` is a short-lived child, so LLVM's 120 MB are given back.

Reads defines (a line of JSON) on stdin and compiles the inlined text: nothing is seen of that from outside. Then it
needs a job on the rest of stdin, at whose end without one it ends: it loads every program and pins it in `programs`;
its tables are those pinned in `maps`, made where missing. Prints {"programs": [...], "refused": {...}} or, on failure,
{"error"}.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import json
import os
import subprocess
import sys
import threading
from dataclasses import asdict, dataclass
from io import FileIO
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from loader import environment, libbpf, source
from meshbpf.errors import DataplaneError, EnvironmentLack

HEADERS = source.BPF / "kernel"
SOCK_OPS, SK_MSG, SCHED_CLS, SOCK_ADDR, CGROUP_SOCK = 13, 16, 3, 18, 9
LOAD_64, PSEUDO_MAP_FD = 0x18, 1  # the instruction that names a table, and what marks its operand as a descriptor
# name → program type, expected attach type (-1: none)
PROGRAMS: dict[str, tuple[int, int]] = {
    "connect4": (SOCK_ADDR, 10),
    "connect6": (SOCK_ADDR, 11),
    "getpeername4": (SOCK_ADDR, 29),
    "getpeername6": (SOCK_ADDR, 30),
    "recvmsg4": (SOCK_ADDR, 19),
    "recvmsg6": (SOCK_ADDR, 20),
    "sendmsg4": (SOCK_ADDR, 14),
    "sendmsg6": (SOCK_ADDR, 15),
    "release": (CGROUP_SOCK, 34),
    "sockops": (SOCK_OPS, -1),
    "command": (SCHED_CLS, -1),
    "redirect": (SK_MSG, -1),
    "redirect_stub": (SK_MSG, -1),
    "redirect_naive": (SK_MSG, -1),  # the self-test's control, only with SELFTEST=1
}


@dataclass(frozen=True, slots=True)
class Job:
    """`maps` and `programs` are folders on bpffs; `defines` become -DNAME=VALUE; `names` which programs to load.

    This kernel may refuse those in `optional`: a verifier of another version must not cost us the others.
    """

    maps: str
    programs: str
    defines: dict[str, int]
    names: tuple[str, ...]
    optional: tuple[str, ...] = ()


class Compiler:
    """Compiles in a child process, which may begin before there is a job. Close it: no child is left then, nor when we
    die.
    """

    def __init__(self) -> None:
        self._begun: tuple[dict[str, int], subprocess.Popen[str]] | None = None

    def begin(self, defines: dict[str, int]) -> None:
        """Have a child compile with these defines, unless that has begun; one that has begun with others is ended."""
        if self._begun is not None and self._begun[0] == defines:
            return
        self.close()
        child = subprocess.Popen(
            [sys.executable, "-P", "-m", "loader.compile"],  # -P: nothing of the working directory's
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,  # a Ctrl-C or hangup is for whoever began it
            env={**os.environ, "BCC_KERNEL_SOURCE": str(HEADERS), "PYTHONPATH": str(source.BPF.parent)},
        )
        self._begun = defines, child
        assert child.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # it has died: what it says of that is heard with the job
            child.stdin.write(f"{json.dumps(defines)}\n")
            child.stdin.flush()

    def run(self, job: Job) -> dict[str, str]:
        """Do `job`; returns the optional programs that were refused, with the kernel's words.

        Raises EnvironmentLack without bcc, DataplaneError with the compiler's words.
        """
        self.begin(job.defines)
        stdout, stderr, code = self._end(json.dumps(asdict(job)))
        try:
            answer: dict[str, Any] = json.loads(stdout.splitlines()[-1])
        except (ValueError, IndexError):
            answer = {"error": f"the compiler process ended with {code}"}
        if answer.get("error") == "bcc":
            raise EnvironmentLack(
                "bcc (Python) is missing",
                "apt-get install python3-bpfcc, and a virtual environment that sees it (make setup)",
            )
        if "error" in answer and "Operation not permitted" in stderr:
            what = answer["error"].splitlines()[0]
            older = "; before kernel 5.11, CAP_SYS_RESOURCE is needed too"
            raise EnvironmentLack(f"{what}: the kernel says EPERM{environment.filtered()}", environment.LET_BPF + older)
        if "error" in answer:
            raise DataplaneError(f"{answer['error']}\n{stderr.strip()[-4000:]}")
        return {name: f"{error}\n{stderr.strip()[-4000:]}" for name, error in answer["refused"].items()}

    def close(self) -> None:
        """End a child that has no job."""
        if self._begun is not None:
            self._end("")

    def _end(self, job: str) -> tuple[str, str, int]:
        """Tell the child its job, or that there is none; what it said, and how it ended."""
        assert self._begun is not None
        (_defines, child), self._begun = self._begun, None
        try:
            return (*child.communicate(job), child.returncode)
        except BaseException:  # Ctrl-C: it has a session of its own, and would go on making pins after our lock is free
            child.kill()
            child.wait()
            raise


class _Instruction(ct.Structure):
    _fields_ = [("code", ct.c_uint8), ("registers", ct.c_uint8), ("offset", ct.c_int16), ("immediate", ct.c_int32)]


def _tables(module: Any, lib: Any, folder: Path) -> dict[int, int]:
    """Pin the tables that bcc has made, and that are not there yet; of the others, bcc's descriptor → the pin's.

    bcc can pin tables itself, but opens a pin that is there by the table's id: that takes CAP_SYS_ADMIN.
    """
    instead = {}
    handle = ct.c_void_p(module.module)
    lib.bpf_table_name.restype = ct.c_char_p
    for number in range(lib.bpf_num_tables(handle)):
        made = lib.bpf_table_fd_id(handle, ct.c_size_t(number))
        pin = folder / lib.bpf_table_name(handle, ct.c_size_t(number)).decode()
        if pin.exists():
            instead[made] = libbpf.get(pin)
        else:
            libbpf.pin(made, pin)
    return instead


def _lead(module: Any, lib: Any, name: str, instead: dict[int, int]) -> None:
    """Let the program, compiled and not yet loaded, use other tables (descriptor → descriptor)."""
    start, size = (call(module.module, name.encode()) for call in (lib.bpf_function_start, lib.bpf_function_size))
    if not start:
        return  # load_func says so
    for step in (_Instruction * (size // ct.sizeof(_Instruction))).from_address(start):
        if step.code == LOAD_64 and step.registers >> 4 == PSEUDO_MAP_FD:
            step.immediate = instead.get(step.immediate, step.immediate)


def _await_job(told: FileIO, jobs: SimpleQueue[Job]) -> None:
    text = told.readall()
    try:
        job = Job(**json.loads(text))
    except ValueError:
        os._exit(0)  # in the middle of compiling: who could have had a job has none, or died while telling it
    jobs.put(job)


def main() -> int:
    # Unbuffered: who is ended while another thread reads a buffered stdin aborts.
    told = open(0, "rb", buffering=0, closefd=False)  # noqa: SIM115
    defines = json.loads(told.readline())
    jobs: SimpleQueue[Job] = SimpleQueue()
    threading.Thread(target=_await_job, args=(told, jobs), daemon=True).start()
    try:
        from bcc import BPF, lib
    except ImportError:
        print(json.dumps({"error": "bcc"}))
        return 1
    flags = [f"-D{name}={value}" for name, value in defines.items()]
    try:
        module = BPF(text=source.text(), cflags=flags)
    except Exception as error:  # noqa: BLE001  bcc raises bare Exception
        print(json.dumps({"error": f"compile: {error}"}))
        return 1
    job = jobs.get()
    instead = _tables(module, lib, Path(job.maps))
    refused: dict[str, str] = {}
    for name in (*job.names, *job.optional):
        kind, attach_type = PROGRAMS[name]
        _lead(module, lib, name, instead)
        try:
            function = module.load_func(name, kind, None, attach_type)
        except Exception as error:  # noqa: BLE001
            if name in job.optional:
                refused[name] = str(error)
                continue
            print(json.dumps({"error": f"load {name}: {error}"}))
            return 1
        path = Path(job.programs) / name
        path.unlink(missing_ok=True)
        libbpf.pin(function.fd, path)
    print(json.dumps({"programs": list(job.names), "refused": refused}))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
