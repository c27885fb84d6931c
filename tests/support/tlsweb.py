"""plainweb over TLS. Takes files that hold a key and its certificate; prints its port.

A caller that names the server NAME gets the certificate NAME.pem, any other one the first.
"""

from __future__ import annotations

import socket
import ssl
import sys
from pathlib import Path
from typing import Any

from tests.support.plainweb import Handler, ThreadingHTTPServer


def main(files: list[str]) -> None:
    contexts = {}
    for file in files:
        contexts[Path(file).stem] = made = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        made.load_cert_chain(file)
    first = contexts[Path(files[0]).stem]

    def named(sock: ssl.SSLObject, name: str | None, _context: ssl.SSLContext) -> None:
        sock.context = contexts.get(name or "", first)

    first.sni_callback = named  # type: ignore[assignment]

    class Server(ThreadingHTTPServer):
        daemon_threads = True

        def finish_request(self, request: socket.socket | tuple[bytes, socket.socket], client_address: Any) -> None:
            """The handshake in the connection's own thread: a silent caller holds up nobody."""
            assert isinstance(request, socket.socket)
            try:
                with first.wrap_socket(request, server_side=True) as encrypted:
                    super().finish_request(encrypted, client_address)
            except (ssl.SSLError, ConnectionError):
                pass  # the caller is told by an alert

    server = Server(("127.0.0.1", 0), Handler)
    print(server.server_address[1], flush=True)
    server.serve_forever()


if __name__ == "__main__":
    main(sys.argv[1:])
