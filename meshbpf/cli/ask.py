"""Ask the running agent, if there is one: GET on its unix socket. No agent is an answer too (None)."""

from __future__ import annotations

import http.client
import json
import socket
from typing import Any

from loader.instance import Instance
from meshbpf.errors import MeshError

SECONDS = 5.0


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=SECONDS)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(SECONDS)
        self.sock.connect(self._path)


def get(instance: Instance, path: str) -> dict[str, Any] | None:
    """The agent's answer; None when no agent listens, or one of a version before that knows no such path. Raises
    MeshError when it answers with an error or not in time.
    """
    connection = _UnixConnection(str(instance.socket))
    try:
        connection.request("GET", path)
        response = connection.getresponse()
        body = response.read()
    except (FileNotFoundError, ConnectionRefusedError):
        return None
    except PermissionError as error:
        raise MeshError(f"{instance.socket}: permission denied; run as root (sudo)") from error
    except OSError as error:
        raise MeshError(f"the agent does not answer on {instance.socket}: {error}") from error
    finally:
        connection.close()
    if response.status == 404:
        return None
    if response.status != 200:
        raise MeshError(f"the agent answered {response.status} to {path}")
    answer: dict[str, Any] = json.loads(body)
    return answer
