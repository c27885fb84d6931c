"""Is one program ready? The checks of `meshbpf register`: tcp, http:PATH, cmd:COMMAND. It only looks.

A check is a value; `run` performs it once and answers with a reason: "" when it passes. A failing check is an answer,
never an exception, and none takes longer than its timeout.
"""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from dataclasses import dataclass

import aiohttp
from yarl import URL


@dataclass(frozen=True, slots=True)
class TcpCheck:
    """Passes when the port accepts a connection."""

    text: str = "tcp"


@dataclass(frozen=True, slots=True)
class HttpCheck:
    """Passes when GET `path` answers 200 to 399 (Kubernetes' rule for probes). Redirects are not followed."""

    path: str

    @property
    def text(self) -> str:
        return f"http:{self.path}"


@dataclass(frozen=True, slots=True)
class CmdCheck:
    """Passes when the command exits with 0. No shell: write `cmd:sh -c '…'` for one."""

    command: tuple[str, ...]

    @property
    def text(self) -> str:
        return "cmd"  # the registry shows it to others; a command line may hold secrets


Check = TcpCheck | HttpCheck | CmdCheck


def parse(text: str) -> Check:
    """The check that `--check TEXT` names. Raises ValueError with what would be right."""
    kind, _, rest = text.partition(":")
    if text == "tcp":
        return TcpCheck()
    if kind == "http" and rest.startswith("/") and rest.isprintable() and " " not in rest:
        return HttpCheck(rest)
    if kind == "cmd":
        try:
            command = tuple(shlex.split(rest))
        except ValueError as error:
            raise ValueError(f"cmd: {error}") from None
        if command:
            return CmdCheck(command)
    raise ValueError(f'"{text}" is no check: write tcp, http:/PATH or cmd:COMMAND')


async def run(check: Check, address: str, port: int, timeout: float) -> str:
    """Why the program at address:port is not ready; empty when it is."""
    try:
        async with asyncio.timeout(timeout):
            match check:
                case TcpCheck():
                    return await _tcp(address, port)
                case HttpCheck(path):
                    return await _http(path, address, port)
                case CmdCheck(command):
                    return await _cmd(command)
    except TimeoutError:
        return f"{check.text}: no answer in {timeout:g} s"


async def _tcp(address: str, port: int) -> str:
    try:
        _, writer = await asyncio.open_connection(address, port)
    except OSError as error:
        # asyncio puts its own words into strerror; the number says "Connection refused".
        return f"tcp: {os.strerror(error.errno) if error.errno else error}"
    writer.close()
    return ""


async def _http(path: str, address: str, port: int) -> str:
    host = f"[{address}]" if ":" in address else address
    try:
        async with aiohttp.ClientSession() as session:
            url = URL(f"http://{host}:{port}{path}", encoded=True)
            async with session.get(url, allow_redirects=False, headers={"User-Agent": "meshbpf-check"}) as response:
                return "" if 200 <= response.status < 400 else f"http:{path}: status {response.status}"
    except (aiohttp.ClientError, OSError) as error:
        return f"http:{path}: {error}"


async def _cmd(command: tuple[str, ...]) -> str:
    try:
        process = await asyncio.create_subprocess_exec(
            *command,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,  # so that a check that hangs is ended with everything it started
        )
    except OSError as error:
        return f"cmd: {command[0]}: {error.strerror or error}"
    try:
        code = await process.wait()
    finally:
        if process.returncode is None:  # timed out, or we are leaving
            os.killpg(process.pid, signal.SIGKILL)
            await process.wait()
    return "" if code == 0 else f"cmd: {command[0]} exited with {code}"
