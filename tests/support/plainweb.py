"""An endpoint whose answers depend on the request alone, so that two can be compared. Prints its port.

/bytes?n=N, /chunked?n=N chunks, /status?code=N; anything else answers with method, path and what came as body.
"""

from __future__ import annotations

import hashlib
import json
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def _body(self) -> bytes:
        if self.headers.get("transfer-encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("content-length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _answer(self) -> None:
        body = self._body()
        url = urlsplit(self.path)
        query = {key: int(values[0]) for key, values in parse_qs(url.query).items() if values[0].isdigit()}
        said = {
            "method": self.command,
            "path": self.path,
            "sha256": hashlib.sha256(body).hexdigest(),
            "size": len(body),
        }
        data = b"x" * query["n"] if url.path == "/bytes" else json.dumps(said).encode()
        code = query["code"] if url.path == "/status" else 200
        self.send_response(code)
        self.send_header("X-Mixed-Case", "kept as it is")
        self.send_header("Set-Cookie", "a=1")
        self.send_header("Set-Cookie", "b=2")
        if code in (204, 304):
            self.end_headers()
        elif url.path == "/chunked" and self.request_version == "HTTP/1.1":
            self.send_header("Transfer-Encoding", "chunked")
            self.end_headers()
            for number in range(query["n"] if self.command != "HEAD" else 0):
                self.wfile.write(b"7\r\npart %d\n\r\n" % (number % 10))
            if self.command != "HEAD":
                self.wfile.write(b"0\r\n\r\n")
        else:
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet."""


if __name__ == "__main__":
    ThreadingHTTPServer.request_queue_size = 512
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
