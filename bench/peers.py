"""Proxies to compare with, each beside what keeps the comparison fair: one thread, equal features, its own best tuning.

What meshbpf's proxy does for every request by default the peers do too: an access log in tmpfs that holds what Envoy's
default line holds, a request id made and handed on, least connections over the same two endpoints, kept connections to
them that any client's request may take, another endpoint tried when a connection fails. Nothing they could do without
is on: no TLS, no compression, no health checks, no statistics page. No limit of theirs shapes a result.
"""

from __future__ import annotations

import subprocess
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

from bench.backend import SMALL, wait_for
from bench.machine import free_ports, program, spawn, stop


class Peer(ABC):
    """A proxy in one process; the client calls its listener directly, so no interception is charged to it."""

    name: str
    client_group: Path | None = None
    namespace: int | None = None

    def __init__(self, run: Path, group: Path, cpus: set[int] | None, endpoints: list[int]) -> None:
        self.run, self.group, self.cpus, self.endpoints = run, group, cpus, endpoints
        self.access_log: Path | None = run / f"{self.name}-access.log"
        self.child: subprocess.Popen[str] | None = None
        self.address = ""

    @abstractmethod
    def command(self, listen: int) -> list[str]:
        """Write the configuration; what starts it. Raises RuntimeError with the remedy where it is not installed."""

    def start(self) -> None:
        (listen,) = free_ports(1, 18200)
        log = self.run / f"{self.name}.out"
        self.child = spawn(self.command(listen), self.group, self.cpus, log)
        wait_for(f"http://127.0.0.1:{listen}/small", self.child, log, SMALL)
        self.address = f"127.0.0.1:{listen}"

    def evidence(self) -> dict[str, Any]:
        return {}

    def stop(self) -> None:
        if self.child is not None:
            stop(self.child)


# - `http-reuse always`: by default the first request of a client never takes a kept connection, which would charge
#   HAProxy with a second new connection per request where the others need none;
# - large answers are spliced from socket to socket: a tenth cheaper here than its buffers, which are the default;
# - the log goes to a descriptor: with a syslog server, a second process would be paid for.
HAPROXY = """\
global
  nbthread 1
  log stdout len 1024 format raw daemon
defaults
  mode http
  log global
  timeout connect 5s
  timeout client 1h
  timeout server 1h
  timeout http-keep-alive 1h
  retries 2
  retry-on conn-failure
  option redispatch 1
  option splice-response
  http-reuse always
frontend in
  bind 127.0.0.1:{listen} backlog 4096
  unique-id-format %[uuid()]
  unique-id-header x-request-id
  capture request header x-forwarded-for len 64
  capture request header user-agent len 64
  capture request header host len 64
  log-format '[%tr] "%r" %ST %tsc %U %B %Ta %Tr "%[capture.req.hdr(0)]" "%[capture.req.hdr(1)]" "%ID" \
"%[capture.req.hdr(2)]" "%si:%sp"'
  default_backend endpoints
backend endpoints
  balance leastconn
{servers}
"""


class HAProxy(Peer):
    name = "haproxy"

    def command(self, listen: int) -> list[str]:
        self.access_log = self.run / f"{self.name}.out"
        servers = "\n".join(f"  server e{port} 127.0.0.1:{port}" for port in self.endpoints)
        file = self.run / "haproxy.cfg"
        file.write_text(HAPROXY.format(listen=listen, servers=servers))
        return [program("haproxy"), "-db", "-f", str(file)]


# - kept connections to the endpoints, without a limit of requests on them, and HTTP/1.1 to use them with: by default
#   nginx opens a connection for every request;
# - large answers stay in memory: by default they go to a file when the client is slower than the endpoint;
# - the log is written by blocks, as Envoy and meshbpf write theirs.
NGINX = """\
daemon off; master_process off; pid {run}/nginx-peer.pid; error_log {run}/nginx-peer.log warn; user root;
events {{ worker_connections 8192; }}
http {{
  log_format line '[$time_iso8601] "$request" $status - $request_length $body_bytes_sent $request_time '
    '$upstream_response_time "$http_x_forwarded_for" "$http_user_agent" "$request_id" "$http_host" "$upstream_addr"';
  access_log {log} line buffer=64k flush=1s;
  default_type text/plain;
  keepalive_timeout 1h; keepalive_requests 1000000000;
  client_body_temp_path {run}/p; proxy_temp_path {run}/p; fastcgi_temp_path {run}/p;
  uwsgi_temp_path {run}/p; scgi_temp_path {run}/p;
  upstream endpoints {{
    least_conn;
    {servers}
    keepalive 256; keepalive_timeout 1h; keepalive_requests 1000000000;
  }}
  server {{
    listen 127.0.0.1:{listen} backlog=4096;
    location / {{
      proxy_pass http://endpoints;
      proxy_http_version 1.1;
      proxy_set_header Connection "";
      proxy_set_header Host $http_host;
      proxy_set_header X-Request-Id $request_id;
      proxy_read_timeout 1h;
      proxy_max_temp_file_size 0;
      proxy_buffer_size 16k; proxy_buffers 16 64k; proxy_busy_buffers_size 256k;
    }}
  }}
}}
"""


class Nginx(Peer):
    name = "nginx"

    def command(self, listen: int) -> list[str]:
        servers = " ".join(f"server 127.0.0.1:{port};" for port in self.endpoints)
        file = self.run / "nginx-peer.conf"
        file.write_text(NGINX.format(run=self.run, log=self.access_log, listen=listen, servers=servers))
        return [program("nginx"), "-c", str(file), "-p", str(self.run)]
