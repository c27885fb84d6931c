"""The demo's network: one namespace per part and one with a bridge that joins them. Made and removed here only.

By iproute2, in a few batches: a child process that ends is sure to have let go of the namespaces it looked into.
"""

from __future__ import annotations

import ipaddress
import subprocess
from collections.abc import Iterable
from pathlib import Path

from meshbpf.demo import cast
from meshbpf.errors import EnvironmentLack, MeshError

NAMESPACES = Path("/run/netns")
SECONDS = 10.0


def _ip(*arguments: str, batch: Iterable[str] = ()) -> None:
    """Raises MeshError with what `ip` said."""
    try:
        done = subprocess.run(
            ["ip", *arguments], input="\n".join(batch), capture_output=True, text=True, check=False, timeout=SECONDS
        )
    except FileNotFoundError as error:
        raise EnvironmentLack("the command ip is missing", "apt-get install iproute2 (make setup)") from error
    if done.returncode != 0:
        raise MeshError(f"ip {' '.join(arguments)}: {done.stderr.strip()}")


def make() -> None:
    """Every part can reach every other one, and nothing else: there is no way in or out."""
    hub = cast.namespace("net")
    names = {part: cast.namespace(part) for part in cast.PARTS}
    width = ipaddress.ip_network(cast.NETWORK).prefixlen
    _ip("-batch", "-", batch=[f"netns add {name}" for name in (hub, *names.values())])
    plug = ["link add bridge type bridge", "link set bridge up"]
    for part, name in names.items():
        # Both ends are born where they belong, so that no interface ever shows up in the machine's own namespace.
        plug.append(f"link add {part} type veth peer name eth0 netns {name}")
        plug.append(f"link set {part} master bridge up")
    _ip("-n", hub, "-batch", "-", batch=plug)
    for part, name in names.items():
        own = ["link set lo up", f"address add {cast.PARTS[part]}/{width} dev eth0", "link set eth0 up"]
        _ip("-n", name, "-batch", "-", batch=own)


def remove() -> list[str]:
    """Every namespace of a demo, this one's or a killed one's; the names that were there."""
    found = sorted(path.name for path in NAMESPACES.glob(cast.PREFIX + "-*"))
    for name in found:
        _ip("netns", "del", name)
    return found
