"""Download from URLs with one deadline for the whole download and a check of every address.

docs/decisions/network.md lists what is refused, and why neither urllib nor httpx is used.
"""

from __future__ import annotations

import base64
import contextlib
import copy
import http.client
import io
import ipaddress
import math
import re
import socket
import string
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import SplitResult, quote, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from mlx_smolvlm.errors import format_error

MAX_REDIRECTS = 10
MAX_HEAD_BYTES = 1 << 20  # before a response's body, including "100 Continue" responses
MIN_RATE = 10_000  # mean bytes per second that a download must reach after its grace period

_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_SAFE = "%/:=&?~#+!$,;'@()*[]"  # in a path and query, which may already be quoted
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # the only IPv6 range assigned so far

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class DownloadError(OSError):
    """A URL cannot be downloaded; the message gives the reason."""


@contextlib.contextmanager
def open_url(
    url: str, timeout_s: float, deadline_s: float, grace_s: float = math.inf
) -> Iterator[tuple[http.client.HTTPResponse, int | None]]:
    """Yield the response of `url`, after redirects, and the stated size of its body in bytes.

    The size is None if the response does not state one.

    Args:
        url: An http or https URL.
        timeout_s: Seconds for which the server may send nothing.
        deadline_s: Seconds for the whole download, from connecting to the last byte.
        grace_s: Seconds, including redirects, after which `MIN_RATE` is required.

    Raises:
        TimeoutError: One of these limits is exceeded; the message says which.
        OSError, http.client.HTTPException, ValueError: Any other failure.
    """
    network = Network(timeout_s, deadline_s, grace_s)
    try:
        with _follow_redirects(network, url) as response:
            yield response, _read_content_length(response)
    except TimeoutError:
        raise TimeoutError(network.describe_timeout()) from None


@contextlib.contextmanager
def _follow_redirects(network: Network, url: str) -> Iterator[http.client.HTTPResponse]:
    """Yield the response of `url`, after redirects."""
    for _ in range(MAX_REDIRECTS + 1):
        with _request(network, _split_url(url)) as response:
            location, status = response.headers.get("Location"), _describe_status(response)
            if response.status in _REDIRECTS and location is not None:
                # http.client decodes headers as Latin-1; quoting restores the bytes.
                location = quote(location, safe=string.punctuation, encoding="latin-1")
                url = urljoin(url, location)
                continue
            if not 200 <= response.status < 300:
                raise DownloadError(status)
            yield response
            return
    raise DownloadError(f"{status}, and {MAX_REDIRECTS} redirects before it")


class Network:
    """Limits that all connections of a download share: time, and allowed addresses."""

    def __init__(self, timeout_s: float, deadline_s: float, grace_s: float) -> None:
        self._timeout_s, self._deadline_s, self._grace_s = timeout_s, deadline_s, grace_s
        self._deadline = time.monotonic() + deadline_s
        self._received = 0  # bytes
        self._is_first_public: bool | None = None  # None before the first connection
        self._head_bytes_left: int | None = None  # None while reading a body

    def compute_timeout(self) -> float:
        """Return how many seconds the next system call may take.

        Raises:
            TimeoutError: The deadline has passed, or too few bytes have arrived so far.
        """
        left = self._compute_time_left()
        if left <= 0:
            raise TimeoutError
        return min(left, self._timeout_s)

    def _compute_time_left(self) -> float:
        """Return the seconds until the deadline or until more bytes are due, if that is sooner."""
        left = self._deadline - time.monotonic()
        return min(left, left - self._deadline_s + self._grace_s + self._received / MIN_RATE)

    def describe_timeout(self) -> str:
        """Return the message for a TimeoutError that was just raised."""
        passed = self._deadline_s - (self._deadline - time.monotonic())
        if passed >= self._deadline_s:
            return f"took longer than {self._deadline_s:g} s to arrive"
        if self._compute_time_left() <= 0:
            return f"sent only {self._received:,} bytes in {passed:.0f} s"
        return f"sent nothing for {self._timeout_s:g} s"

    def connect(self, host: str, port: int) -> socket.socket:
        """Connect to the first address of `host` that is allowed and answers.

        The name is looked up once, and the connection goes to the address that was checked. A
        name server that gives another answer the next time (DNS rebinding) thus has no effect.
        """
        failure: OSError = DownloadError(f"{host} has no address")
        for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM):
            address = ipaddress.ip_address(entry[4][0])
            try:
                self.check_address(address, host)
                connection = self._dial(entry)
            except OSError as error:
                failure = error
                continue
            self.admit_address(address, host)
            return connection
        raise failure

    def connect_proxy(self, host: str, port: int) -> socket.socket:
        """Connect to a proxy. Its address is not checked, since the user configured it."""
        network = copy.copy(self)
        network._is_first_public = None
        return network.connect(host, port)

    def _dial(self, entry: tuple[Any, ...]) -> socket.socket:
        """Connect to an address as returned by `socket.getaddrinfo`."""
        family, kind, protocol, _, address = entry
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(self.compute_timeout())
            connection.connect(address)
            connection.settimeout(self.compute_timeout())  # for the TLS handshake
        except BaseException:
            connection.close()
            raise
        return connection

    def check_address(self, address: IPAddress, host: str) -> None:
        """Check that a download from a public address does not go on to a private one.

        Otherwise a public page could make us send requests to services of this machine or of
        the local network.

        Raises:
            DownloadError: `address` is not public, and the first one was.
        """
        if self._is_first_public and not is_public(address):
            raise DownloadError(
                f"it redirects to {host} ({address}), which is not a public address; "
                "give that URL itself if you trust it"
            )

    def admit_address(self, address: IPAddress | None, host: str) -> None:
        """Check the `address` of `host` and, if it is the first, remember whether it is public.

        None stands for an address that a proxy looks up; it counts as public.
        """
        if address is not None:
            self.check_address(address, host)
        if self._is_first_public is None:
            self._is_first_public = address is None or is_public(address)

    @contextlib.contextmanager
    def limit_head(self) -> Iterator[None]:
        """Limit the bytes received within the block to `MAX_HEAD_BYTES`."""
        self._head_bytes_left = MAX_HEAD_BYTES
        yield
        self._head_bytes_left = None

    def count_bytes(self, nbytes: int) -> None:
        """Count bytes that were received, in a head or a body.

        Raises:
            DownloadError: The head exceeds `MAX_HEAD_BYTES`.
        """
        self._received += nbytes
        if self._head_bytes_left is not None:
            self._head_bytes_left -= nbytes
            if self._head_bytes_left < 0:
                raise DownloadError(f"its header is longer than {MAX_HEAD_BYTES // 1024} KiB")


def is_public(address: IPAddress) -> bool:
    """Whether `address` is on the public internet.

    Loopback, private, link-local, shared, reserved, multicast and unspecified addresses are
    not. An IPv6 address that embeds an IPv4 address is judged by the latter.
    """
    if isinstance(address, ipaddress.IPv6Address):
        inner = address.ipv4_mapped or address.sixtofour
        if address in _NAT64:
            inner = ipaddress.IPv4Address(address.packed[-4:])
        if inner is None:
            return address in _GLOBAL_UNICAST and address.is_global
        address = inner
    return address.is_global and not (address.is_reserved or address.is_multicast)


def parse_address(host: str) -> IPAddress | None:
    """Parse `host` as an IP address in any notation, or localhost; None for other names."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return ipaddress.IPv4Address("127.0.0.1")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name)
    with contextlib.suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(name))  # such as 127.1 and 0x7f000001
    return None


class _Connection(http.client.HTTPConnection):
    """A connection that `network` opens and limits."""

    network: Network
    is_proxy = False  # whether it connects to a proxy
    _response: http.client.HTTPResponse | None = None

    def connect(self) -> None:
        """Connect through `network`; called by HTTPSConnection.connect, which adds TLS."""
        connect = self.network.connect_proxy if self.is_proxy else self.network.connect
        self.sock = connect(self.host, self.port)
        if self._tunnel_host:  # type: ignore[attr-defined]  # as http.client.HTTPConnection does
            try:
                self._tunnel()  # type: ignore[attr-defined]
            finally:  # before Python 3.11.3, http.client leaves the proxy's response open
                if self._response is not None:
                    self._response.close()

    def response_class(self, sock: Any, *args: Any, **options: Any) -> http.client.HTTPResponse:  # type: ignore[override]  # called as the class is
        """Return a response whose reads are limited in time."""
        self._response = http.client.HTTPResponse(
            _TimedSocket(sock, self.network),  # type: ignore[arg-type]  # it only calls makefile
            *args,
            **options,
        )
        return self._response


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """The same with TLS; the certificate is checked against the host name of the URL."""


class _TimedSocket:
    """A stand-in for `sock` whose file limits the time of each read."""

    def __init__(self, sock: socket.socket, network: Network) -> None:
        self._sock, self._network = sock, network

    def makefile(self, mode: str) -> io.BufferedReader:
        """Return a file for reading, as socket.makefile does."""
        return io.BufferedReader(_TimedReader(self._sock, self._network))


class _TimedReader(io.RawIOBase):
    """Reads from `sock` until the deadline of `network`.

    The timeout of a socket applies to one call, and a slow server can spread a response over
    many. So the timeout is set to the remaining time before each read.
    """

    def __init__(self, sock: socket.socket, network: Network) -> None:
        self._sock, self._network = sock, network
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Read into `buffer` and return the number of bytes; 0 at the end."""
        self._sock.settimeout(self._network.compute_timeout())
        count = self._file.readinto(buffer) or 0
        self._network.count_bytes(count)
        return count

    def close(self) -> None:
        """Close the file of the socket."""
        self._file.close()
        super().close()


@contextlib.contextmanager
def _request(network: Network, url: SplitResult) -> Iterator[http.client.HTTPResponse]:
    """Send a GET request for `url` and yield the response, without following redirects."""
    if "@" in url.netloc:
        raise DownloadError(
            "its user name and password are not sent; fetch it with another program, "
            "such as curl, and give the file"
        )
    host, port = _get_host_and_port(url)
    target = quote((url.path or "/") + (f"?{url.query}" if url.query else ""), safe=_SAFE)
    headers = {"User-Agent": "mlx-smolvlm", "Connection": "close"}
    proxy = _find_proxy(url.scheme, host, port)
    via = proxy or url
    is_secure = "https" in (url.scheme, via.scheme)
    connection = (_SecureConnection if is_secure else _Connection)(*_get_host_and_port(via))
    connection.network, connection.is_proxy = network, proxy is not None
    if proxy is not None:
        # The proxy looks up the name, so an address can only be checked here if the URL states
        # one. What the proxy may reach is up to its owner.
        network.admit_address(parse_address(host), host)
        login = _build_login_header(proxy)
        if url.scheme == "https":
            connection.set_tunnel(host, port, login)
        else:
            name = f"[{host}]" if ":" in host else host
            target, headers = f"http://{name}:{port}{target}", headers | login
    with contextlib.closing(connection):
        with network.limit_head():
            connection.request("GET", target, headers=headers)
            response = connection.getresponse()
        with response:
            yield response


def _split_url(url: str) -> SplitResult:
    """Split `url`; errors do not quote it, since any part may contain a password."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise DownloadError("it is not a valid URL") from None
    if parts.scheme not in _PORTS:
        raise DownloadError(f"unknown url type: {parts.scheme}")
    if not parts.hostname:
        raise DownloadError("it is not a valid URL: it has no host")
    return parts


def _get_host_and_port(url: SplitResult) -> tuple[str, int]:
    """Return the host name in ASCII, and the port."""
    host = url.hostname or ""
    name = host if host.isascii() else host.encode("idna").decode()
    return name, _PORTS[url.scheme] if url.port is None else url.port


def _find_proxy(scheme: str, host: str, port: int) -> SplitResult | None:
    """Return the proxy configured for a host by the system or environment, or None."""
    proxy = getproxies().get(scheme)
    if not proxy or proxy_bypass(f"{host}:{port}"):
        return None
    try:
        return _split_url(proxy if "://" in proxy else f"http://{proxy}")
    except DownloadError as error:
        raise DownloadError(f"the proxy for {scheme} cannot be used: {error}") from None


def _build_login_header(proxy: SplitResult) -> dict[str, str]:
    """Return a header with the user name and password of `proxy`; empty if it has none."""
    if proxy.username is None:
        return {}
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}


def _describe_status(response: http.client.HTTPResponse) -> str:
    """Return the status of `response` as text, such as "HTTP 404, Not Found"."""
    reason = f", {format_error(response.reason)}" if response.reason else ""
    return f"HTTP {response.status}{reason}"


def _read_content_length(response: http.client.HTTPResponse) -> int | None:
    """Return the Content-Length of `response` in bytes; None if it has none or is chunked.

    Raises:
        DownloadError: It is not a number, or there are several different ones.
    """
    lengths = {one.strip() for one in response.headers.get_all("Content-Length", [])}
    if response.chunked or not lengths:
        return None
    # int() would also accept "1_0" and "+1".
    if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", length := lengths.pop()):
        raise DownloadError("its Content-Length is not a number of bytes")
    return int(length)
