"""A server on 127.0.0.1 that answers as a test tells it to, byte by byte if need be."""

from __future__ import annotations

import contextlib
import socket
import ssl
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[[socket.socket], None]

# For the name public.test; valid from 2020 to 2120, and trusted by no system.
KEY = """\
-----BEGIN PRIVATE KEY-----
MIGHAgEAMBMGByqGSM49AgEGCCqGSM49AwEHBG0wawIBAQQgSE7ehItrYC2089o7
vUvJGYdMqdaXuvBZvzbl1x8oub6hRANCAAT8BAWzYUxBOTtgzBXS+ST7OLDABfyX
NbwOs2uz9E9mya8c17gHDF/sQgrP19AaVGuQv8hc795fiozcMm+3ErSX
-----END PRIVATE KEY-----
"""
CERTIFICATE = """\
-----BEGIN CERTIFICATE-----
MIIBdzCCAR2gAwIBAgIBATAKBggqhkjOPQQDAjAWMRQwEgYDVQQDDAtwdWJsaWMu
dGVzdDAgFw0yMDAxMDEwMDAwMDBaGA8yMTIwMDEwMTAwMDAwMFowFjEUMBIGA1UE
AwwLcHVibGljLnRlc3QwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAT8BAWzYUxB
OTtgzBXS+ST7OLDABfyXNbwOs2uz9E9mya8c17gHDF/sQgrP19AaVGuQv8hc795f
iozcMm+3ErSXo1owWDAWBgNVHREEDzANggtwdWJsaWMudGVzdDAPBgNVHRMBAf8E
BTADAQH/MA4GA1UdDwEB/wQEAwIChDAdBgNVHQ4EFgQU4MOqwaMCNCEHtr6lXi75
Qx91vAMwCgYIKoZIzj0EAwIDSAAwRQIhAJhMyfYhorLTyZvtT2Pr1J2nzHkQOBYj
bpcdIS3cRbCvAiBBFUuT1V3BcHtBdeG1xMMixtzI9zKMufgizqLkxF5XAQ==
-----END CERTIFICATE-----
"""


class Server:
    """Answers by path, and notes the head of every request.

    Attributes:
        answers: What to send to a path, or to all others under "".
        heads: The requests' heads so far.
        has_dripped_all: Whether a `drip` came to its end.
        stop: Set when the server ends; what waits is to wait for it.
    """

    def __init__(self) -> None:
        self.answers: dict[str, bytes | Answer] = {}
        self.heads: list[str] = []
        self.stop = threading.Event()
        self.has_dripped_all = False
        self.tls: ssl.SSLContext | None = None  # to speak TLS in, if at all
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self._threads = [threading.Thread(target=self._accept)]
        self._threads[0].start()

    def use_tls(self, folder: Path) -> Path:
        """Speak TLS as public.test from now on; the file with the certificate."""
        certificate = folder / "certificate.pem"
        certificate.write_text(KEY + CERTIFICATE)
        self.tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.tls.load_cert_chain(certificate)
        return certificate

    def close(self) -> None:
        """End every thread."""
        self.stop.set()
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                connection, _ = self._listener.accept()
                self._threads.append(threading.Thread(target=self._serve, args=(connection,)))
                self._threads[-1].start()

    def _serve(self, connection: socket.socket) -> None:
        with contextlib.suppress(OSError), contextlib.ExitStack() as stack:
            stack.enter_context(connection)
            connection.settimeout(5)
            if self.tls is not None:
                connection = stack.enter_context(self.tls.wrap_socket(connection, server_side=True))
            self.answer(connection)

    def answer(self, connection: socket.socket) -> None:
        """Read a request and answer it."""
        data = b""
        while b"\r\n\r\n" not in data:
            received = connection.recv(4096)
            if not received:
                return
            data += received
        self.heads.append(data.decode("latin-1"))
        path = self.heads[-1].split(" ")[1]
        answer = self.answers.get(path, self.answers.get("", b"HTTP/1.1 404 Not here\r\n\r\n"))
        if callable(answer):
            answer(connection)
        else:
            connection.sendall(answer)

    def drip(self, *pieces: bytes, pause_s: float = 0.02, seconds: float = 3) -> Answer:
        """An answer whose last piece is sent again and again for a while, with pauses."""

        def answer(connection: socket.socket) -> None:
            for piece in pieces[:-1]:
                connection.sendall(piece)
            for _ in range(round(seconds / pause_s)):
                if self.stop.wait(pause_s):
                    return
                connection.sendall(pieces[-1])
            self.has_dripped_all = True

        return answer

    def flood(self, *pieces: bytes, nbytes: int = 1 << 24) -> Answer:
        """An answer whose last piece is sent again and again, without pauses."""

        def answer(connection: socket.socket) -> None:
            for piece in pieces[:-1]:
                connection.sendall(piece)
            block = pieces[-1] * (65536 // len(pieces[-1]) + 1)
            for _ in range(nbytes // len(block)):
                connection.sendall(block)

        return answer


def ok(body: bytes, *headers: str) -> bytes:
    """A whole response."""
    lines = ["HTTP/1.1 200 OK", *(headers or (f"Content-Length: {len(body)}",))]
    return "\r\n".join([*lines, "", ""]).encode("latin-1") + body


def redirect(target: str) -> bytes:
    """A response that redirects to `target`."""
    return f"HTTP/1.1 302 Found\r\nLocation: {target}\r\nContent-Length: 0\r\n\r\n".encode()


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    """A server for as long as the block."""
    server = Server()
    try:
        yield server
    finally:
        server.close()


class QuietHandler(BaseHTTPRequestHandler):
    """A handler that logs nothing, and does not mind a client that leaves."""

    def log_message(self, *_: object) -> None:
        """Log nothing."""

    def handle(self) -> None:
        """Handle requests until the client leaves."""
        with contextlib.suppress(ConnectionError):
            super().handle()


@contextlib.contextmanager
def serve(handler: type[QuietHandler]) -> Iterator[str]:
    """Run a server with `handler` while the body runs; yields its URL, without a final slash."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,))
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
