"""Tells the service manager that started us (systemd's Type=notify, sd_notify(3)) how far we are; else tells nobody."""

from __future__ import annotations

import logging
import os
import socket

log = logging.getLogger("notify")
READY, STOPPING = "READY=1", "STOPPING=1"


def tell(state: str) -> None:
    """Send `state` to $NOTIFY_SOCKET, if there is one. A manager that cannot be told is logged: it will time out."""
    address = os.environ.get("NOTIFY_SOCKET")
    if not address:
        return
    name = "\0" + address[1:] if address.startswith("@") else address  # @: Linux's abstract names
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
            sock.sendto(state.encode(), name)
    except OSError as error:
        log.warning("service manager not told state=%s error=%s", state, error)
