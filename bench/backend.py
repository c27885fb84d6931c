"""The backend every subject is measured against: one nginx worker, two endpoints, two bodies, nothing else.

Two listening ports of the same worker, so that a balancer has a choice to make and the work behind stays the same.
nginx because it costs about 5 us per request: less than any subject, so that it hides none of them. One process without
a master, because a master killed with the bench would leave its worker behind.
"""

from __future__ import annotations

import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path

from bench.machine import free_ports, program, spawn, stop, tail

SMALL = 1024
LARGE = 1 << 20

CONFIG = """\
daemon off; master_process off; pid {run}/nginx.pid; error_log {run}/nginx.log warn; user root;
events {{ worker_connections 8192; }}
http {{
  access_log off;             # the subjects log; the backend would only add the same to all
  default_type text/plain;
  sendfile on; tcp_nopush on; open_file_cache max=10 inactive=1h;
  keepalive_timeout 1h; keepalive_requests 1000000000;
  client_body_temp_path {run}/t; proxy_temp_path {run}/t; fastcgi_temp_path {run}/t;
  uwsgi_temp_path {run}/t; scgi_temp_path {run}/t;
  server {{
    {listen}
    location = /small {{ return 200 "{small}"; }}
    location = /large {{ root {run}; }}
  }}
}}
"""


class Backend:
    """start() returns when both endpoints answer with the expected lengths; stop() leaves nothing."""

    def __init__(self, run: Path, group: Path, cpus: set[int] | None) -> None:
        self.run, self.group, self.cpus = run, group, cpus
        self.ports: list[int] = []
        self.child: subprocess.Popen[str] | None = None

    def start(self) -> None:
        self.ports = free_ports(2)
        listen = " ".join(f"listen 127.0.0.1:{port} backlog=4096;" for port in self.ports)
        (self.run / "large").write_bytes(b"x" * LARGE)
        config = self.run / "nginx.conf"
        config.write_text(CONFIG.format(run=self.run, listen=listen, small="x" * SMALL))
        log = self.run / "nginx.out"
        self.child = spawn([program("nginx"), "-c", str(config), "-p", str(self.run)], self.group, self.cpus, log)
        for port in self.ports:
            wait_for(f"http://127.0.0.1:{port}/small", self.child, log, SMALL)
            wait_for(f"http://127.0.0.1:{port}/large", self.child, log, LARGE)

    def stop(self) -> None:
        if self.child is not None:
            stop(self.child)


def wait_for(
    url: str, child: subprocess.Popen[str], log: Path, length: int | None = None, patience: float = 30
) -> None:
    """Wait until `url` answers 200 (with `length` bytes); a child that dies first is reported with its last words."""
    deadline = time.monotonic() + patience
    last = "no answer"
    while time.monotonic() < deadline:
        if child.poll() is not None:
            raise RuntimeError(f"{Path(str(child.args[0])).name} ended with {child.returncode}: {tail(log)}")  # type: ignore[index]
        try:
            with urllib.request.urlopen(url, timeout=2) as answer:
                body = answer.read()
            if length is None or len(body) == length:
                return
            last = f"{len(body)} bytes instead of {length}"
        except (OSError, urllib.error.URLError) as error:
            last = str(error)
        time.sleep(0.05)
    raise RuntimeError(f"{url} not ready after {patience:.0f} s: {last}; {tail(log)}")
