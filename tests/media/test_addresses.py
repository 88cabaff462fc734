"""Downloads connect only to allowed addresses, and exactly to those that were checked."""

import ipaddress
import socket

import pytest

from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media import download
from mlx_smolvlm.media.fetch import open_bytes
from tests.helpers import web_server as web

PUBLIC, PRIVATE = "127.0.0.1", "127.0.0.9"  # as the `server` fixture treats them


@pytest.fixture
def server(monkeypatch):
    """A server whose address, 127.0.0.1, counts as public."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    original = download.is_public
    monkeypatch.setattr(download, "is_public", lambda ip: str(ip) == PUBLIC or original(ip))
    with web.serving() as made:
        made.answers["/ok"] = web.ok(b"body")
        yield made


@pytest.fixture
def names(monkeypatch):
    """(known, asked): addresses by name, the first set used per look-up; names looked up."""
    known, asked = {}, []
    original = socket.getaddrinfo

    def look_up(host, port, *arguments, **options):
        if host not in known:
            return original(host, port, *arguments, **options)
        asked.append(host)
        found = known[host].pop(0)
        return [entry for one in found for entry in original(one, port, *arguments, **options)]

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    return known, asked


def body_of(url):
    with open_bytes(url) as stream:
        return stream.read()


def refused(url):
    with pytest.raises(MediaError) as caught:
        body_of(url)
    return str(caught.value)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("8.8.8.8", True), ("93.184.216.34", True), ("2606:4700::1111", True),
        ("127.0.0.1", False), ("127.8.9.1", False), ("0.0.0.0", False), ("10.1.2.3", False),
        ("172.16.0.1", False), ("172.31.255.255", False), ("172.32.0.1", True),
        ("192.168.1.1", False), ("169.254.169.254", False), ("100.64.0.1", False),
        ("198.18.0.1", False), ("192.0.2.1", False), ("224.0.0.1", False), ("240.0.0.1", False),
        ("255.255.255.255", False), ("239.1.1.1", False),
        ("::1", False), ("::", False), ("fe80::1", False), ("fe80::1%1", False),
        ("fec0::1", False), ("fc00::1", False), ("fd12::1", False), ("ff02::1", False),
        ("ff0e::1", False), ("2001:db8::1", False), ("::7f00:1", False),
        ("::ffff:127.0.0.1", False), ("::ffff:10.0.0.1", False), ("::ffff:8.8.8.8", True),
        ("2002:7f00:1::1", False), ("2002:808:808::1", True),
        ("64:ff9b::7f00:1", False), ("64:ff9b::808:808", True), ("64:ff9b:1::808:808", False),
    ],
)  # fmt: skip
def test_public_addresses(text, expected):
    assert download.is_public(ipaddress.ip_address(text)) is expected


@pytest.mark.parametrize(
    "host",
    ["127.0.0.9", "127.9", "2130706441", "0x7f000009", "0177.0.0.011", "[::ffff:127.0.0.9]",
     "[::ffff:7f00:9]", "[::1]", "[::]", "[fe80::1]", "0.0.0.0", "0", "10.0.0.1", "169.254.169.254",
     "240.0.0.1"],
)  # fmt: skip
def test_no_redirect_leads_from_a_public_address_to_another(server, host, monkeypatch):
    monkeypatch.setattr(
        socket.socket, "connect", guarded(socket.socket.connect, server.port), raising=True
    )
    server.answers["/start"] = web.redirect(f"http://{host}:{server.port}/ok")
    message = refused(f"http://127.0.0.1:{server.port}/start")
    assert "it redirects to" in message
    assert "which is not a public address" in message
    assert len(server.heads) == 1


def guarded(connect, port):
    """Wrap `socket.socket.connect` so that it only connects to the server."""

    def connect_here(self, address):
        assert address[:2] == (PUBLIC, port), address
        return connect(self, address)

    return connect_here


@pytest.mark.parametrize("hops", [1, 3])
def test_every_hop_is_checked(server, names, hops):
    names[0]["inside.test"] = [[PRIVATE]]
    for number in range(hops):
        server.answers[f"/{number}"] = web.redirect(f"/{number + 1}")
    server.answers[f"/{hops}"] = web.redirect(f"http://inside.test:{server.port}/ok")
    message = refused(f"http://127.0.0.1:{server.port}/0")
    assert f"it redirects to inside.test ({PRIVATE}), which is not a public address" in message
    assert len(server.heads) == hops + 1


def test_a_first_address_that_is_private_may_lead_to_another(monkeypatch, names):
    names[0]["inside.test"] = [["127.0.0.1"]]
    with web.serving() as server:
        server.answers["/start"] = web.redirect(f"http://inside.test:{server.port}/ok")
        server.answers["/ok"] = web.ok(b"body")
        assert body_of(f"http://127.0.0.1:{server.port}/start") == b"body"


def test_a_private_network_may_lead_out_and_back(server, names, monkeypatch):
    """Such as a private page, a public login, and back: only the first address counts."""
    monkeypatch.setattr(download, "is_public", lambda address: next(public))
    public = iter([False, True, False])
    server.answers["/start"] = web.redirect("/login")
    server.answers["/login"] = web.redirect("/ok")
    assert body_of(f"http://127.0.0.1:{server.port}/start") == b"body"


def test_a_name_is_looked_up_once_and_what_was_checked_is_connected_to(server, names):
    """The name server returns a private address from the second look-up on (DNS rebinding)."""
    known, asked = names
    known["rebind.test"] = [[PUBLIC], [PRIVATE], [PRIVATE]]
    server.answers["/start"] = web.redirect(f"http://rebind.test:{server.port}/ok")
    assert body_of(f"http://127.0.0.1:{server.port}/start") == b"body"
    assert asked == ["rebind.test"]
    assert f"\r\nHost: rebind.test:{server.port}\r\n" in server.heads[1]


def test_a_name_that_changes_between_redirects_is_checked_again(server, names):
    known, asked = names
    known["rebind.test"] = [[PUBLIC], [PRIVATE]]
    server.answers["/start"] = web.redirect("/ok")
    assert "which is not a public address" in refused(f"http://rebind.test:{server.port}/start")
    assert asked == ["rebind.test"] * 2


def test_of_several_addresses_a_private_one_is_left_out(server, names):
    names[0]["both.test"] = [[PRIVATE, PUBLIC]]
    server.answers["/start"] = web.redirect(f"http://both.test:{server.port}/ok")
    assert body_of(f"http://127.0.0.1:{server.port}/start") == b"body"


def test_the_next_address_is_tried(server, names):
    names[0]["two.test"] = [["127.0.0.2", PUBLIC]]  # nobody listens at the first
    assert body_of(f"http://two.test:{server.port}/ok") == b"body"


# TLS


def test_a_certificate_must_be_for_the_name_in_the_url(server, names, tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(server.use_tls(tmp_path)))
    names[0].update({"public.test": [[PUBLIC]] * 3, "other.test": [[PUBLIC]] * 2})
    assert body_of(f"https://public.test:{server.port}/ok") == b"body"
    server.answers["/start"] = web.redirect(f"https://public.test:{server.port}/ok")
    assert body_of(f"https://public.test:{server.port}/start") == b"body"
    server.answers["/start"] = web.redirect(f"https://other.test:{server.port}/ok")
    for url in ("https://other.test:{}/ok", "https://127.0.0.1:{}/ok"):
        assert "certificate verify failed" in refused(url.format(server.port))
    names[0]["public.test"] = [[PUBLIC]]
    assert "certificate verify failed" in refused(f"https://public.test:{server.port}/start")


def test_a_certificate_that_nobody_signed_is_refused(server, names, tmp_path):
    server.use_tls(tmp_path)
    names[0]["public.test"] = [[PUBLIC]]
    assert "certificate verify failed" in refused(f"https://public.test:{server.port}/ok")


# Proxies


def test_a_proxy_makes_the_connection(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://me:secret@127.0.0.1:{server.port}")
    server.answers["http://far.test:80/a?b=c"] = web.redirect("http://far.test:8080/ok")
    server.answers["http://far.test:8080/ok"] = web.ok(b"body")
    assert body_of("http://far.test/a?b=c") == b"body"
    assert all("\r\nProxy-Authorization: Basic bWU6c2VjcmV0\r\n" in one for one in server.heads)
    assert "\r\nHost: far.test:80" in server.heads[0]
    message = refused("http://far.test/missing")
    assert "HTTP 404" in message
    assert "secret" not in message


def test_no_certificate_is_checked_against_a_proxy(server, monkeypatch, tmp_path):
    """The proxy forwards bytes; TLS is between us and the host behind it."""
    monkeypatch.setenv("SSL_CERT_FILE", str(server.use_tls(tmp_path)))
    tls, server.tls = server.tls, None

    def tunnel(connection):
        connection.sendall(b"HTTP/1.1 200 Connected\r\n\r\n")
        with tls.wrap_socket(connection, server_side=True) as inner:
            server.answer(inner)

    for host in ("public.test", "other.test"):
        server.answers[f"{host}:443"] = tunnel
    monkeypatch.setenv("https_proxy", f"http://me:secret@127.0.0.1:{server.port}")
    assert body_of("https://public.test/ok") == b"body"
    tunneled, inner = server.heads
    assert "\r\nProxy-Authorization: Basic bWU6c2VjcmV0\r\n" in tunneled
    assert "Proxy-Authorization" not in inner
    assert "certificate verify failed" in refused("https://other.test/ok")
    assert "Tunnel connection failed: 404" in refused("https://third.test/ok")


@pytest.mark.parametrize(
    "host", ["10.0.0.1", "0x7f.9", "[::1]", "localhost", "localhost.", "a.localhost", "127.0.0.9"]
)
def test_a_redirect_to_what_is_seen_to_be_private_reaches_no_proxy(server, monkeypatch, host):
    monkeypatch.setattr(download, "is_public", lambda address: address.is_global)
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.port}")
    server.answers["http://far.test:80/start"] = web.redirect(f"http://{host}/ok")
    assert "which is not a public address" in refused("http://far.test/start")
    assert len(server.heads) == 1


def test_a_proxy_that_does_not_speak_http(server, monkeypatch):
    monkeypatch.setenv("http_proxy", f"socks5://me:secret@127.0.0.1:{server.port}")
    message = refused("http://far.test/ok")
    assert "the proxy for http cannot be used: unknown url type: socks5" in message
    assert "secret" not in message


# URLs


@pytest.mark.parametrize(
    "url", ["http://me:pass@{}/ok", "http://me:p@ss@{}/ok", "http://me@{}/ok", "HTTP://:x@{}/ok"]
)
def test_user_names_and_passwords_are_neither_sent_nor_shown(server, url):
    message = refused(url.format(f"127.0.0.1:{server.port}"))
    assert f"//127.0.0.1:{server.port}/ok' cannot be fetched: its user name and" in message
    assert not server.heads
    server.answers["/start"] = web.redirect(url.format(f"127.0.0.1:{server.port}"))
    assert "its user name and password are not sent" in refused(
        f"http://127.0.0.1:{server.port}/start"
    )


@pytest.mark.parametrize(
    "url",
    ["http://me:topsecret@", "http://me:topsecret", "http://[me:topsecret@host/x",
     "http://me:topsecret@ho st/x", "http://me:top/secret@host/x", "http://me:top#secret@host",
     "http://me:99999999@h:topsecret/", "http://me:topsecret@\u2100.com/", "http:///topsecret@x",
     " http://me:topsecret@host:x/", "http:/me:topsecret@host/x"],
)  # fmt: skip
def test_no_url_that_is_wrong_shows_its_password(server, url):
    assert "secret" not in refused(url)


def test_a_name_in_other_letters(server, names):
    names[0]["xn--bcher-kva.test"] = [[PUBLIC]]
    assert body_of(f"http://bücher.test:{server.port}/ok") == b"body"
    assert "\r\nHost: xn--bcher-kva.test:" in server.heads[0]
