"""The body of a URL: one deadline for all of it, and every address checked before it is used.

docs/decisions/network.md says what is refused, and why neither urllib nor httpx does this.
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
MAX_HEAD_BYTES = 1 << 20  # before a response's body, any number of "100 Continue" included
MIN_RATE = 10_000  # bytes a second, on the mean, of a download that takes longer than its grace

_REDIRECTS = (301, 302, 303, 307, 308)
_PORTS = {"http": 80, "https": 443}
_SAFE = "%/:=&?~#+!$,;'@()*[]"  # in a path and query, which may be quoted already
_NAT64 = ipaddress.ip_network("64:ff9b::/96")
_GLOBAL_UNICAST = ipaddress.ip_network("2000::/3")  # all that IPv6 has given out

IPAddress = ipaddress.IPv4Address | ipaddress.IPv6Address


class DownloadError(OSError):
    """A URL cannot be fetched, for the reason that the message gives."""


@contextlib.contextmanager
def open_url(
    url: str, timeout_s: float, deadline_s: float, grace_s: float = math.inf
) -> Iterator[tuple[http.client.HTTPResponse, int | None]]:
    """Yields the response at `url`, after redirects, and its body's size in bytes if it says one.

    Args:
        url: An http or https URL.
        timeout_s: How long the server may send nothing.
        deadline_s: How long everything may take, from the connection to the body's last byte.
        grace_s: How long it may take, redirects included, before `MIN_RATE` counts.

    Raises:
        TimeoutError: One of these is over; the message says which.
        OSError, http.client.HTTPException, ValueError: Anything else that goes wrong.
    """
    network = Network(timeout_s, deadline_s, grace_s)
    try:
        with _follow_redirects(network, url) as response:
            yield response, _read_content_length(response)
    except TimeoutError:
        raise TimeoutError(network.describe_timeout()) from None


@contextlib.contextmanager
def _follow_redirects(network: Network, url: str) -> Iterator[http.client.HTTPResponse]:
    """Yields the response at `url`, after redirects."""
    for _ in range(MAX_REDIRECTS + 1):
        with _request(network, _split_url(url)) as response:
            location, status = response.headers.get("Location"), _describe_status(response)
            if response.status in _REDIRECTS and location is not None:
                # http.client reads headers as Latin-1; quoting gives the bytes back.
                location = quote(location, safe=string.punctuation, encoding="latin-1")
                url = urljoin(url, location)
                continue
            if not 200 <= response.status < 300:
                raise DownloadError(status)
            yield response
            return
    raise DownloadError(f"{status}, and {MAX_REDIRECTS} redirects before it")


class Network:
    """What all connections of a download share: its time, and where it may go."""

    def __init__(self, timeout_s: float, deadline_s: float, grace_s: float) -> None:
        self._timeout_s, self._deadline_s, self._grace_s = timeout_s, deadline_s, grace_s
        self._deadline = time.monotonic() + deadline_s
        self._received = 0  # bytes
        self._is_first_public: bool | None = None  # whether the first address was; None before it
        self._head_bytes_left: int | None = None  # None in a body

    def compute_timeout(self) -> float:
        """How many seconds the next system call may take.

        Raises:
            TimeoutError: The deadline is over, or too few bytes came for the time that passed.
        """
        left = self._compute_time_left()
        if left <= 0:
            raise TimeoutError
        return min(left, self._timeout_s)

    def _compute_time_left(self) -> float:
        """Seconds until the deadline, or until more bytes must have arrived if that is sooner."""
        left = self._deadline - time.monotonic()
        return min(left, left - self._deadline_s + self._grace_s + self._received / MIN_RATE)

    def describe_timeout(self) -> str:
        """What to say of a download after a TimeoutError."""
        passed = self._deadline_s - (self._deadline - time.monotonic())
        if passed >= self._deadline_s:
            return f"took longer than {self._deadline_s:g} s to arrive"
        if self._compute_time_left() <= 0:
            return f"sent only {self._received:,} bytes in {passed:.0f} s"
        return f"sent nothing for {self._timeout_s:g} s"

    def connect(self, host: str, port: int) -> socket.socket:
        """A connection to the first address of `host` that is admitted and answers.

        The name is looked up once, and the address that was checked is the one connected to. So
        a name server that gives another answer the next time (DNS rebinding) gains nothing.
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
        """A connection to a proxy, which the user chose, so that its address is not checked."""
        network = copy.copy(self)
        network._is_first_public = None
        return network.connect(host, port)

    def _dial(self, entry: tuple[Any, ...]) -> socket.socket:
        """A connection to an address as `socket.getaddrinfo` gives it."""
        family, kind, protocol, _, address = entry
        connection = socket.socket(family, kind, protocol)
        try:
            connection.settimeout(self.compute_timeout())
            connection.connect(address)
            connection.settimeout(self.compute_timeout())  # of a TLS handshake as a whole
        except BaseException:
            connection.close()
            raise
        return connection

    def check_address(self, address: IPAddress, host: str) -> None:
        """Refuse the `address` of `host` if it is not public and the first one was.

        A public page could otherwise have us ask services that are meant for this machine or
        its network alone.

        Raises:
            DownloadError: It is refused.
        """
        if self._is_first_public and not is_public(address):
            raise DownloadError(
                f"it redirects to {host} ({address}), which is not a public address; "
                "give that URL itself if you trust it"
            )

    def admit_address(self, address: IPAddress | None, host: str) -> None:
        """Check the `address` of `host` and, if it is the first, note whether it is public.

        None is an address that a proxy finds, and counts as public.
        """
        if address is not None:
            self.check_address(address, host)
        if self._is_first_public is None:
            self._is_first_public = address is None or is_public(address)

    @contextlib.contextmanager
    def limit_head(self) -> Iterator[None]:
        """Bound the bytes that are received within the block."""
        self._head_bytes_left = MAX_HEAD_BYTES
        yield
        self._head_bytes_left = None

    def count_bytes(self, nbytes: int) -> None:
        """Note that bytes were received, of a head or of a body.

        Raises:
            DownloadError: They are too many before a body.
        """
        self._received += nbytes
        if self._head_bytes_left is not None:
            self._head_bytes_left -= nbytes
            if self._head_bytes_left < 0:
                raise DownloadError(f"its header is longer than {MAX_HEAD_BYTES // 1024} KiB")


def is_public(address: IPAddress) -> bool:
    """Whether `address` is one of the public internet, of IPv6 by the IPv4 address in it.

    Loopback, private, link-local, shared, reserved, multicast and unspecified ones are not.
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
    """The address that `host` is in any of its spellings, or localhost; None of other names."""
    name = host.rstrip(".").lower()
    if name == "localhost" or name.endswith(".localhost"):
        return ipaddress.IPv4Address("127.0.0.1")
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name)
    with contextlib.suppress(OSError):
        return ipaddress.IPv4Address(socket.inet_aton(name))  # such as 127.1 and 0x7f000001
    return None


class _Connection(http.client.HTTPConnection):
    """A connection that `network` opens and times."""

    network: Network
    is_proxy = False  # whether it is one to a proxy

    def connect(self) -> None:
        """Connect; in between HTTPSConnection.connect and what it would call."""
        connect = self.network.connect_proxy if self.is_proxy else self.network.connect
        self.sock = connect(self.host, self.port)
        if self._tunnel_host:  # type: ignore[attr-defined]  # as http.client.HTTPConnection does
            self._tunnel()  # type: ignore[attr-defined]

    def response_class(self, sock: Any, *args: Any, **options: Any) -> http.client.HTTPResponse:  # type: ignore[override]  # called as the class is
        """A response, of which each read is timed."""
        return http.client.HTTPResponse(_TimedSocket(sock, self.network), *args, **options)  # type: ignore[arg-type]  # makefile is all it needs


class _SecureConnection(http.client.HTTPSConnection, _Connection):
    """The same with TLS, whose certificate is checked against the URL's host name."""


class _TimedSocket:
    """Makes the file that a response reads from `sock`."""

    def __init__(self, sock: socket.socket, network: Network) -> None:
        self._sock, self._network = sock, network

    def makefile(self, mode: str) -> io.BufferedReader:
        """A file for reading; see socket.makefile."""
        return io.BufferedReader(_TimedReader(self._sock, self._network))


class _TimedReader(io.RawIOBase):
    """What arrives on `sock`, however slowly, until the deadline of `network`.

    The timeout of a socket bounds one call. Of a header that arrives byte by byte every byte is
    one, and so is every chunk of a body, so the time that is left is set before each.
    """

    def __init__(self, sock: socket.socket, network: Network) -> None:
        self._sock, self._network = sock, network
        self._file = sock.makefile("rb", buffering=0)

    def readable(self) -> bool:
        """Yes."""
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes read into `buffer`; 0 at the end."""
        self._sock.settimeout(self._network.compute_timeout())
        count = self._file.readinto(buffer) or 0
        self._network.count_bytes(count)
        return count

    def close(self) -> None:
        """Let go of the socket."""
        self._file.close()
        super().close()


@contextlib.contextmanager
def _request(network: Network, url: SplitResult) -> Iterator[http.client.HTTPResponse]:
    """Yields the response to a GET request for `url`, redirects not followed."""
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
        # The proxy looks the name up and connects, so no address can be checked here, unless
        # the URL itself is one. What the proxy may reach is for its owner to decide.
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
    """The parts of a `url`; its text is in no error, since a password may be in any part."""
    try:
        parts = urlsplit(url)
        _ = parts.port
    except ValueError:
        raise DownloadError("it is not a valid URL") from None
    if parts.scheme not in _PORTS:
        raise DownloadError(f"unknown url type: {parts.scheme}")
    if not parts.hostname:
        raise DownloadError("it is not a valid URL, since it names no host")
    return parts


def _get_host_and_port(url: SplitResult) -> tuple[str, int]:
    """The host's name in ASCII, and the port."""
    host = url.hostname or ""
    name = host if host.isascii() else host.encode("idna").decode()
    return name, _PORTS[url.scheme] if url.port is None else url.port


def _find_proxy(scheme: str, host: str, port: int) -> SplitResult | None:
    """The proxy that the system or the environment names for a host; None to do without."""
    proxy = getproxies().get(scheme)
    if not proxy or proxy_bypass(f"{host}:{port}"):
        return None
    try:
        return _split_url(proxy if "://" in proxy else f"http://{proxy}")
    except DownloadError as error:
        raise DownloadError(f"the proxy for {scheme} cannot be used: {error}") from None


def _build_login_header(proxy: SplitResult) -> dict[str, str]:
    """The header with the user name and password of `proxy`, if it has any."""
    if proxy.username is None:
        return {}
    login = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(login.encode()).decode()}"}


def _describe_status(response: http.client.HTTPResponse) -> str:
    """The status of `response` in words."""
    reason = f", {format_error(response.reason)}" if response.reason else ""
    return f"HTTP {response.status}{reason}"


def _read_content_length(response: http.client.HTTPResponse) -> int | None:
    """The size in bytes that `response` says its body has; None if it does not say.

    Raises:
        DownloadError: What it says is not a number, or several different ones.
    """
    lengths = {one.strip() for one in response.headers.get_all("Content-Length", [])}
    if response.chunked or not lengths:
        return None
    # int() would take "²", "1_0" and "+1" as well.
    if len(lengths) > 1 or not re.fullmatch("[0-9]{1,18}", length := lengths.pop()):
        raise DownloadError("its Content-Length is not a number of bytes")
    return int(length)
