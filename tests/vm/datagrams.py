"""UDP on the test machine. `serve PORT`: answers every datagram. `ask ADDRESS PORT`: asks by a connected and by an
unconnected socket; both must see the service's address, and who has no endpoint an error."""

import socket
import sys

NOBODY = "127.96.0.13"


def serve(port: int) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.bind(("127.0.0.1", port))
        while True:
            data, source = sock.recvfrom(100)
            sock.sendto(b"answer to " + data, source)


def ask(service: tuple[str, int]) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        sock.settimeout(10)
        for _ in range(2):
            sock.sendto(b"unconnected", service)
            assert sock.recvfrom(100) == (b"answer to unconnected", service)
        sock.connect(service)
        assert sock.getpeername() == service
        sock.send(b"connected")
        assert sock.recvfrom(100) == (b"answer to connected", service)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sock:
        try:
            sock.sendto(b"question", (NOBODY, service[1]))
        except OSError as error:
            print(f"no endpoint: {error.strerror}")
        else:
            raise AssertionError("a service without endpoint took a datagram")


if sys.argv[1] == "serve":
    serve(int(sys.argv[2]))
else:
    ask((sys.argv[2], int(sys.argv[3])))
