"""Real TLS clients on `tls` ports, straight and through the proxy: what they see is what they see without the mesh."""

from __future__ import annotations

import hashlib
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.machine import SECONDS, Machine, policy, service, until, which

DIRECT, PROXIED = "127.96.0.20", "127.96.0.21"
NAMES = ("shop.test", "other.test")


def openssl(folder: Path, *arguments: str) -> None:
    subprocess.run([which("openssl"), *arguments], cwd=folder, capture_output=True, check=True, timeout=SECONDS)


@pytest.fixture(scope="module")
def authority(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A certificate authority of our own, and what it has signed: NAME.pem with key and certificate."""
    folder = tmp_path_factory.mktemp("authority")
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    openssl(folder, "req", "-x509", *curve, "-keyout", "ca.key", "-out", "ca.crt", "-days", "2", "-subj", "/CN=ours")
    for name in NAMES:
        (folder / "names").write_text(f"subjectAltName=DNS:{name},IP:{DIRECT},IP:{PROXIED},IP:127.0.0.1\n")
        openssl(folder, "req", *curve, "-keyout", f"{name}.key", "-out", f"{name}.csr", "-subj", f"/CN={name}")
        signing = ("-req", "-in", f"{name}.csr", "-CA", "ca.crt", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2")
        openssl(folder, "x509", *signing, "-extfile", "names", "-out", f"{name}.crt")
        (folder / f"{name}.pem").write_bytes(b"".join((folder / f"{name}.{x}").read_bytes() for x in ("key", "crt")))
    return folder


@pytest.fixture
def shop(machine: Machine, authority: Path) -> tuple[Machine, int]:
    """One TLS server behind two services, `straight` and `proxied`; and its port."""
    files = [str(authority / f"{name}.pem") for name in NAMES]
    web = machine.start([sys.executable, "-m", "tests.support.tlsweb", *files], stdout=subprocess.PIPE, text=True)
    port = int(web.stdout.readline())
    machine.configure(
        service("straight", DIRECT, [port], protocol="tls", port=443),
        service("proxied", PROXIED, [port], protocol="tls", port=443),
        policy("proxied", mode="proxy"),
    )
    machine.run_agent()
    shown = {row["service"]: (row["carrier"], row["why"]) for row in machine.show("services")["services"]}
    assert shown == {"straight": ("direct", "protocol_tls"), "proxied": ("proxy", "policy_mode_proxy")}
    return machine, port


def without(*command: str) -> subprocess.CompletedProcess[str]:
    """The command outside of the mesh."""
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)


@pytest.mark.parametrize("address", [DIRECT, PROXIED])
def test_curl(shop: tuple[Machine, int], authority: Path, tmp_path: Path, address: str) -> None:
    machine, port = shop
    (tmp_path / "up").write_bytes(bytes(range(256)) * 4096)
    base = [which("curl"), "-sS", "-i", "--max-time", "10", "--cacert", str(authority / "ca.crt")]
    up = ["--data-binary", f"@{tmp_path}/up"]
    calls = [
        (version, more, name, path)
        for version in (["--tlsv1.2", "--tls-max", "1.2"], ["--tlsv1.3"])
        for name in NAMES
        for more, path in (([], "/hello"), ([], "/bytes?n=1048576"), ([], "/chunked?n=50"), (up, "/things"))
    ]
    for version, more, name, path in calls:
        call = [*base, *version, *more, f"https://{name}{path}", "--connect-to"]
        outside = without(*call, f"{name}:443:127.0.0.1:{port}")
        inside = machine.client(*call, f"{name}:443:{address}:443")
        assert inside.returncode == outside.returncode == 0, (path, inside.stderr, outside.stderr)
        assert "HTTP/1.1 200" in inside.stdout
        assert comparable(inside.stdout) == comparable(outside.stdout)
    if address == PROXIED:
        records = machine.records(len(calls))
        assert [record["requested_server_name"] for record in records] == [name for _, _, name, _ in calls]
        assert {record["reason"] for record in records} == {None}
        assert {record["upstream_host"] for record in records} == {f"127.0.0.1:{port}"}
        assert {(record["service"], record["protocol"], record["carrier"]) for record in records} == {
            ("proxied", "TCP", "proxy")
        }


def comparable(answer: str) -> str:
    """Without the server's clock, and short enough to be read in a failure."""
    head, _, body = re.sub(r"(?m)^Date: .*$", "", answer).partition("\n\n")
    return f"{head}\n{hashlib.sha256(body.encode()).hexdigest()}"


@pytest.mark.parametrize("address", [DIRECT, PROXIED])
def test_the_certificates_are_the_endpoints(shop: tuple[Machine, int], authority: Path, address: str) -> None:
    machine, port = shop
    base = [which("openssl"), "s_client", "-showcerts", "-CAfile", str(authority / "ca.crt"), "-verify_return_error"]
    for version in ("-tls1_2", "-tls1_3"):
        for naming in (["-servername", "shop.test"], ["-servername", "other.test"], ["-noservername"]):
            name = naming[-1] if len(naming) == 2 else "shop.test"
            options = [version, *naming, "-verify_hostname", name]
            outside = without(*base, *options, "-connect", f"127.0.0.1:{port}")
            inside = machine.client(*base, *options, "-connect", f"{address}:443")
            assert inside.returncode == outside.returncode == 0, inside.stderr
            assert f"subject=CN = {name}" in inside.stdout
            assert "Verify return code: 0 (ok)" in inside.stdout
            assert agreed(inside.stdout) == agreed(outside.stdout)
    if address == PROXIED:
        told = [(record["requested_server_name"], record["reason"]) for record in machine.records(6)]
        assert told == [("shop.test", None), ("other.test", None), (None, "sni_missing")] * 2


def agreed(out: str) -> list[str]:
    """The certificates, and what client and server agreed on."""
    certificates = re.findall(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", out, re.DOTALL)
    lines = re.findall(r"(?m)^(?:New, |Server Temp Key: |Peer sign|Server public key).*$", out)
    assert len(certificates) == 1 and len(lines) >= 4, out
    return [*certificates, *lines]


HOSTILE = """
import socket, sys
with socket.create_connection((sys.argv[1], int(sys.argv[2])), timeout=10) as sock:
    sock.sendall(bytes.fromhex(sys.argv[3]))
    if sys.argv[4] == "end":
        sock.shutdown(socket.SHUT_WR)
    answer = b""
    try:
        while part := sock.recv(65536):
            answer += part
    except ConnectionResetError:
        answer += b"RST"
print(answer.hex())
"""


@pytest.mark.parametrize(
    ("said", "then", "reason"),
    [
        (b"GET / HTTP/1.1\r\nHost: x\r\n\r\n", "wait", "not_tls"),
        (b"\x80\x2e\x01\x00\x02\x00\x15\x00\x00\x00\x10" + bytes(37), "wait", "not_tls"),
        (b"\x16\x03\x01\x00\x04\x01\x00\x00\x00", "wait", "not_tls"),
        (b"\x16\x03\x01\x00\xf0\x01\x00", "end", "hello_cut"),
        (b"", "end", "hello_cut"),
    ],
    ids=["plaintext", "sslv2", "malformed", "cut", "nothing"],
)
def test_what_is_no_tls_gets_the_endpoints_own_answer(
    shop: tuple[Machine, int], said: bytes, then: str, reason: str
) -> None:
    machine, port = shop
    command = [sys.executable, "-c", HOSTILE]
    outside = without(*command, "127.0.0.1", str(port), said.hex(), then)
    assert outside.returncode == 0, outside.stderr
    for address in (DIRECT, PROXIED):
        inside = machine.client(*command, address, "443", said.hex(), then)
        assert (inside.returncode, inside.stdout) == (0, outside.stdout), inside.stderr
    (record,) = machine.records(1)
    assert (record["requested_server_name"], record["reason"]) == (None, reason)
    url = f"http://127.0.0.1:{machine.admin_port}/metrics"

    def counted() -> bool:
        text = without(which("curl"), "-sS", "--max-time", "5", url).stdout
        return f'meshbpf_proxy_verdicts_total{{reason="{reason}",service="proxied"}} 1.0' in text

    until(counted, f"{reason} in the metrics")
