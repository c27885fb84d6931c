"""An endpoint for tests: HTTP/1.1, answers with its name and what it saw. `server.py NAME [ADDRESS [PORT]]`.

Prints its port on stdout once it listens. GET /slow?s=3 answers after that many seconds; any other path at once.
"""

from __future__ import annotations

import json
import sys
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, urlsplit


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    name = "?"

    def _answer(self) -> None:
        length = int(self.headers.get("content-length") or 0)
        body = self.rfile.read(length)
        url = urlsplit(self.path)
        if url.path == "/slow":
            time.sleep(float(parse_qs(url.query)["s"][0]))  # the point of this path
        seen: dict[str, Any] = {
            "endpoint": self.name,
            "method": self.command,
            "path": self.path,
            "headers": dict(self.headers.items()),
            "body": len(body),
            "client": self.client_address[0],
        }
        data = json.dumps(seen).encode()
        self.send_response(200)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    do_GET = do_POST = do_PUT = do_HEAD = do_DELETE = _answer

    def log_message(self, format: str, *args: Any) -> None:
        """Quiet: a test reads stdout for the port only."""


def main() -> None:
    Handler.name = sys.argv[1]
    address = sys.argv[2] if len(sys.argv) > 2 else "127.0.0.1"
    port = int(sys.argv[3]) if len(sys.argv) > 3 else 0
    ThreadingHTTPServer.request_queue_size = 512
    server = ThreadingHTTPServer((address, port), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main()
