"""Real servers for tests: each on a loopback port of its own, configured in a folder of its own, awaited, ended by pid.

`meshed` puts a server into the mesh's cgroup: it then is an application like any other, also as somebody's client.
Nothing is read from or written to the machine's own configuration of these programs.
"""

from __future__ import annotations

import glob
import grp
import os
import pwd
import shutil
import signal
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.support.machine import SECONDS, Machine, free_port, until, which

MODULES = Path("/usr/lib/apache2/modules")
NOBODY = "nobody"  # who runs what refuses to be root

NGINX = """\
daemon off; master_process off; user root; pid {folder}/nginx.pid; error_log {folder}/nginx.log warn;
events {{ worker_connections 1024; }}
http {{
  access_log off; default_type application/octet-stream; server_tokens off; etag off;
  client_body_temp_path {folder}/t; proxy_temp_path {folder}/t; fastcgi_temp_path {folder}/t;
  uwsgi_temp_path {folder}/t; scgi_temp_path {folder}/t; client_max_body_size 100m;
  {http}
}}
"""
# AcceptFilter data is TCP_DEFER_ACCEPT: the kernel hands a connection over once the caller has spoken.
APACHE = """\
ServerRoot {folder}
ServerName localhost
PidFile {folder}/apache.pid
DefaultRuntimeDir {folder}
ErrorLog {folder}/apache.log
User {user}
Group {group}
Listen 127.0.0.1:{port}
AcceptFilter http data
LoadModule mpm_event_module {modules}/mod_mpm_event.so
LoadModule authz_core_module {modules}/mod_authz_core.so
DocumentRoot {root}
FileETag None
KeepAlive On
MaxKeepAliveRequests 0
"""
HAPROXY = """\
global
  stats socket {folder}/haproxy.sock mode 600 level admin
  nbthread 1
defaults
  mode http
  option splice-auto
  option splice-request
  option splice-response
  timeout connect 5s
  timeout client 30s
  timeout server 30s
  http-reuse always
{sections}
"""


def answers(port: int) -> bool:
    """Whether somebody accepts there."""
    with socket.socket() as probe:
        probe.settimeout(SECONDS)
        return probe.connect_ex(("127.0.0.1", port)) == 0


@contextmanager
def serving(
    machine: Machine,
    command: Sequence[str],
    port: int,
    *,
    meshed: bool = False,
    stop: signal.Signals = signal.SIGTERM,
    **options: Any,
) -> Iterator[int]:
    """The server's port, while it runs; it has to say goodbye within the usual patience."""
    with tempfile.TemporaryFile("w+") as said:
        options |= {"stdin": subprocess.DEVNULL, "stdout": said, "stderr": said}
        process = machine.start_client(*command, **options) if meshed else machine.start(command, **options)

        def up() -> bool:
            if process.poll() is not None:
                said.seek(0)
                raise AssertionError(f"{command[0]} has ended: {said.read()}")
            return answers(port)

        try:
            until(up, f"{command[0]} accepts")
            yield port
        finally:
            process.send_signal(stop)
            process.wait(SECONDS)


@contextmanager
def folder_of(user: str = "root") -> Iterator[Path]:
    """A folder that this user can reach and owns: pytest's own are root's alone."""
    made = tempfile.mkdtemp(prefix="meshbpf-test-")
    entry = pwd.getpwnam(user)
    os.chown(made, entry.pw_uid, entry.pw_gid)
    try:
        yield Path(made)
    finally:
        shutil.rmtree(made)


def group_of(user: str) -> str:
    return grp.getgrgid(pwd.getpwnam(user).pw_gid).gr_name


def programs_of_postgres() -> Path:
    """Debian keeps those of every version beside each other, outside of PATH."""
    found = glob.glob("/usr/lib/postgresql/*/bin/initdb")
    assert found, "PostgreSQL is missing: vagrant/provision.sh test"
    return Path(max(found, key=lambda path: float(path.split("/")[4]))).parent


@contextmanager
def postgres(machine: Machine) -> Iterator[int]:
    """A fresh PostgreSQL with the superuser `postgres`, whom it trusts."""
    programs, port = programs_of_postgres(), free_port()
    who: dict[str, Any] = {"user": NOBODY, "group": group_of(NOBODY)}
    with folder_of(NOBODY) as folder:
        data = folder / "data"
        command = [str(programs / "initdb"), "-D", str(data), "-U", "postgres", "-A", "trust", "--no-sync"]
        command += ["-E", "UTF8", "--locale=C"]
        made = subprocess.run(command, capture_output=True, text=True, check=False, cwd=folder, **who)
        assert made.returncode == 0, made.stderr
        settings = {
            "listen_addresses": "127.0.0.1", "port": port, "unix_socket_directories": "", "fsync": "off",
            "shared_buffers": "16MB", "max_connections": 50, "ssl": "off", "autovacuum": "off",
        }  # fmt: skip
        options = [word for name, value in settings.items() for word in ("-c", f"{name}={value}")]
        # SIGINT: a fast shutdown, which does not wait for clients.
        command = ["env", "--chdir", str(folder), str(programs / "postgres"), "-D", str(data), *options]
        with serving(machine, command, port, stop=signal.SIGINT, **who):
            yield port


@contextmanager
def redis(machine: Machine) -> Iterator[int]:
    port = free_port()
    with folder_of() as folder:
        command = [which("redis-server"), "--port", str(port), "--bind", "127.0.0.1", "--dir", str(folder)]
        with serving(machine, [*command, "--save", "", "--appendonly", "no"], port):
            yield port


@contextmanager
def nginx(machine: Machine, http: str, port: int, *, meshed: bool = False) -> Iterator[int]:
    """One process; `http` is what stands in its http section and listens on `port`."""
    with folder_of() as folder:
        file = folder / "nginx.conf"
        file.write_text(NGINX.format(folder=folder, http=http))
        command = [which("nginx"), "-p", str(folder), "-c", str(file), "-e", str(folder / "nginx.log")]
        with serving(machine, command, port, meshed=meshed):
            yield port


@contextmanager
def apache(machine: Machine, root: Path, *, meshed: bool = False) -> Iterator[int]:
    """One process with threads, its listener with TCP_DEFER_ACCEPT; `nobody` must be able to read what is in `root`."""
    port = free_port()
    with folder_of() as folder:
        file = folder / "apache.conf"
        who = {"user": NOBODY, "group": group_of(NOBODY)}
        file.write_text(APACHE.format(folder=folder, port=port, root=root, modules=MODULES, **who))
        command = [which("apache2"), "-X", "-f", str(file)]
        with serving(machine, command, port, meshed=meshed):
            yield port


class HAProxy:
    """A running HAProxy: `port` is its first one."""

    def __init__(self, port: int, stats: Path) -> None:
        self.port, self._stats = port, stats

    def info(self) -> dict[str, str]:
        """What its `show info` says."""
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(SECONDS)
            client.connect(str(self._stats))
            client.sendall(b"show info\n")
            text = b""
            while part := client.recv(65536):
                text += part
        return dict(line.split(": ", 1) for line in text.decode().splitlines() if ": " in line)


@contextmanager
def haproxy(machine: Machine, sections: str, port: int, *, meshed: bool = False) -> Iterator[HAProxy]:
    """`sections` are its frontends and backends; one of them listens on `port`. It splices wherever it can."""
    with folder_of() as folder:
        file = folder / "haproxy.cfg"
        file.write_text(HAPROXY.format(folder=folder, sections=sections))
        with serving(machine, [which("haproxy"), "-db", "-f", str(file)], port, meshed=meshed):
            yield HAProxy(port, folder / "haproxy.sock")
