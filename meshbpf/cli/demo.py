"""`meshbpf demo`: play it once, leave nothing however it ends. One at a time; a killed one is taken away first."""

from __future__ import annotations

import signal
import socket
import struct
import sys
import time
from types import FrameType

import typer

from loader import environment
from meshbpf.errors import Busy, MeshError


def register(app: typer.Typer) -> None:
    app.command()(demo)


def demo() -> None:
    """Small services, real calls, one planted fault. In namespaces of their own, under 30 s; leaves nothing."""
    from meshbpf.demo import cleanup
    from meshbpf.demo.play import Play
    from meshbpf.demo.scene import Scene, agent_says

    environment.require_capabilities()
    environment.require_bpffs()
    began = time.monotonic()
    sys.stdout.reconfigure(line_buffering=True)  # type: ignore[union-attr]
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _stop)
    with _alone():
        if left := cleanup.clean():
            typer.echo(f"taken away from a killed demo: {', '.join(left)}\n")
        scene = Scene()
        try:
            Play(scene, typer.echo).run()
        except KeyboardInterrupt:
            typer.echo("\ninterrupted: taking everything away", err=True)
            raise typer.Exit(130) from None
        except MeshError as error:
            raise MeshError(f"{error}\n\nThe agent's last words:\n{agent_says()}") from error
        finally:
            for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
                signal.signal(number, signal.SIG_IGN)  # a second Ctrl-C must not leave half of it behind
            removed = cleanup.clean()
            scene.close()
    names = sum(1 for line in removed if line.startswith("namespace"))
    typer.echo(f"\nRemoved: the instance, its pins, {names} namespaces, the cgroups and all processes.")
    typer.echo(f"Took {time.monotonic() - began:.0f} s. Next: your own services, in five lines of README.md.")


def _stop(number: int, _frame: FrameType | None) -> None:
    typer.echo(f"\n{signal.Signals(number).name}: taking everything away", err=True)
    raise typer.Exit(128 + number)


def _alone() -> socket.socket:
    """Held while a demo runs, and let go by the kernel with its process. Raises Busy, naming the other one."""
    held = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    name = "\0meshbpf-demo"
    try:
        held.bind(name)
        held.listen(1)
    except OSError as error:
        held.connect(name)
        raw = held.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
        held.close()
        raise Busy(f"a demo is running already, process {struct.unpack('3i', raw)[0]}") from error
    return held
