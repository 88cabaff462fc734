"""Downloads: one deadline for the whole download, limits on sizes, strict Content-Length."""

import base64
import contextlib
import itertools
import re

import pytest

from mlx_smolvlm.errors import MediaError
from mlx_smolvlm.media import download, fetch
from mlx_smolvlm.media.fetch import open_bytes
from tests.helpers import web_server as web


@pytest.fixture
def server(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "HTTP_PROXY", "HTTPS_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with web.serving() as made:
        made.url = f"http://127.0.0.1:{made.port}"
        yield made


def body_of(url, **options):
    with open_bytes(url, **options) as stream:
        return stream.read()


def refused(url, **options):
    with pytest.raises(MediaError) as caught:
        body_of(url, **options)
    return str(caught.value)


# Time


def dripping(server, kind):
    """A response that takes 3 s without pausing for long, and is then complete."""
    head = b"HTTP/1.1 200 OK\r\n"
    return {
        "body": server.drip(web.ok(b"", "Content-Length: 1000"), b"x"),
        "chunks": server.drip(web.ok(b"", "Transfer-Encoding: chunked"), b"1\r\nx\r\n"),
        "chunk size": server.drip(web.ok(b"", "Transfer-Encoding: chunked"), b"0"),
        "chunk trailers": server.drip(
            web.ok(b"0\r\n", "Transfer-Encoding: chunked"), b"a: trailer\r\n"
        ),
        "status": server.drip(b"HTTP/1.1 200 ", b"O"),
        "header": server.drip(head + b"X-Long: ", b"x"),
        "headers": server.drip(head, b"X-More: a\r\n", pause_s=0.05),
        "100": server.drip(b"HTTP/1.1 100 Continue\r\n\r\n"),
        "100 with headers": server.drip(b"HTTP/1.1 100 Continue\r\n", b"X-More: a\r\n"),
        "redirects": lambda connection: (
            server.stop.wait(0.1),
            connection.sendall(web.redirect("/again")),
        ),
        "redirect's header": server.drip(b"HTTP/1.1 302 Found\r\nLocation: /", b"x"),
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["body", "chunks", "chunk size", "chunk trailers", "status", "header", "headers", "100",
     "100 with headers", "redirects", "redirect's header"],
)  # fmt: skip
def test_the_deadline_holds_for_every_part_of_an_answer(server, monkeypatch, kind):
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(fetch, "DEADLINE_S", 0.3)
    server.answers[""] = dripping(server, kind)
    assert "took longer than 0.3 s to arrive" in refused(server.url + "/a.png")
    assert not server.has_dripped_all
    if kind == "redirects":
        assert 2 <= len(server.heads) <= 4


def test_a_video_has_a_deadline_of_its_own(server, monkeypatch):
    monkeypatch.setattr(fetch, "DEADLINE_S", 0.1)
    server.answers[""] = server.drip(web.ok(b"", "Content-Length: 8"), b"x", pause_s=0.05)
    assert "took longer than 0.1 s" in refused(server.url + "/a.mp4")
    assert body_of(server.url + "/a.mp4", video=True) == b"x" * 8
    monkeypatch.setattr(fetch, "VIDEO_DEADLINE_S", 0.1)
    assert "took longer than 0.1 s" in refused(server.url + "/a.mp4", video=True)


@pytest.mark.parametrize("kind", ["body", "chunk trailers", "header", "100", "redirects"])
def test_a_video_that_hardly_comes_is_given_up_long_before_its_deadline(server, monkeypatch, kind):
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.5)
    monkeypatch.setattr(fetch, "VIDEO_GRACE_S", 0.3)
    server.answers[""] = dripping(server, kind)
    said = refused(server.url + "/a.mp4", video=True)
    assert re.search(r"sent only \d+ bytes in \d+ s; try again", said)
    assert not server.has_dripped_all


@pytest.mark.parametrize(("nbytes", "passed_s"), [(1, 120), (25_000, 240), (51_000, 3600)])
def test_the_pace_that_a_video_must_keep(monkeypatch, nbytes, passed_s):
    """With a clock on which each read takes 5 s."""
    clock = itertools.count(0, 5)
    monkeypatch.setattr(download.time, "monotonic", lambda: next(clock))
    network, reads = download.Network(20, 3600, 120), 0
    with contextlib.suppress(TimeoutError):
        while network.compute_timeout() > 0:
            network.count_bytes(nbytes)
            reads += 1
    assert abs(5 * reads - passed_s) <= 10


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_silence_ends_earlier_than_the_deadline(server, monkeypatch, scheme):
    monkeypatch.setattr(fetch, "TIMEOUT_S", 0.1)
    server.answers[""] = lambda _: server.stop.wait(3)
    assert "sent nothing for 0.1 s" in refused(f"{scheme}://127.0.0.1:{server.port}/a.png")


# Sizes


def test_the_head_of_a_response_is_bounded(server):
    # Newer Pythons read at most 100 interim responses; these exceed the limit before that.
    line = b"a: " + b"b" * 30_000 + b"\r\n"
    for pieces in (
        (b"HTTP/1.1 100 Continue\r\n" + line + b"\r\n",),
        (b"HTTP/1.1 100 Continue\r\n", line + b"\r\nHTTP/1.1 100 Continue\r\n"),
    ):
        server.answers[""] = server.flood(*pieces)
        assert "its header is longer than 1024 KiB" in refused(server.url)


def test_interim_responses_are_bounded(server):
    for pieces in (
        (b"HTTP/1.1 100 Continue\r\n\r\n",),
        (b"HTTP/1.1 100 Continue\r\n", b"a: b\r\n\r\nHTTP/1.1 100 Continue\r\n"),
    ):
        server.answers[""] = server.flood(*pieces)
        said = refused(server.url)
        counted = "got more than 100 interim responses"  # by newer Pythons
        assert "its header is longer than 1024 KiB" in said or counted in said


def test_a_few_continues_are_none_too_many(server):
    server.answers[""] = b"HTTP/1.1 100 Continue\r\n\r\n" * 3 + web.ok(b"body")
    assert body_of(server.url) == b"body"


def test_the_body_of_a_redirect_is_not_read(server, monkeypatch):
    monkeypatch.setattr(fetch, "DEADLINE_S", 2.0)
    head = b"HTTP/1.1 302 Found\r\nLocation: /there\r\n\r\n"
    server.answers["/here"] = server.drip(head, b"x" * 1000, seconds=4)
    server.answers["/there"] = web.ok(b"body")
    assert body_of(server.url + "/here") == b"body"


def test_redirects_are_counted(server):
    for number in range(12):
        server.answers[f"/{number}"] = web.redirect(f"/{number + 1}")
    server.answers["/12"] = web.ok(b"body")
    assert body_of(server.url + "/2") == b"body"
    assert "HTTP 302, Found, and 10 redirects before it" in refused(server.url + "/1")
    assert len(server.heads) == 11 + 11


def test_a_size_above_the_limit_is_refused_before_a_body_is_read(server):
    server.answers[""] = web.ok(b"", "Content-Length: 999999999999")
    assert "is larger than 256 MiB" in refused(server.url)


@pytest.mark.parametrize("length", ["²", "+5", "-5", "1_0", "0x5", "5.0", "5, 6", "9" * 5000, ""])
def test_a_content_length_is_digits(server, length):
    server.answers[""] = web.ok(b"hello", f"Content-Length: {length}")
    assert "its Content-Length is not a number of bytes" in refused(server.url)


def test_a_content_length_that_comes_twice(server):
    server.answers["/same"] = web.ok(b"hello", "Content-Length: 5", "Content-Length: 5")
    server.answers["/other"] = web.ok(b"hello", "Content-Length: 5", "Content-Length: 3")
    assert body_of(server.url + "/same") == b"hello"
    assert "its Content-Length is not a number" in refused(server.url + "/other")


def test_chunks_count_more_than_a_length_beside_them(server):
    headers = ("Content-Length: 99", "Transfer-Encoding: chunked")
    server.answers[""] = web.ok(b"5\r\nhello\r\n0\r\n\r\n", *headers)
    assert body_of(server.url) == b"hello"


# Data URIs


@pytest.mark.parametrize("kind", ["base64", "percent"])
@pytest.mark.parametrize("is_video", [False, True])
def test_a_large_data_uri_is_refused_before_it_is_decoded(monkeypatch, kind, is_video):
    data = bytes(range(256)) * 4
    coded = base64.encodebytes(data).decode().replace("+", "%2B")
    head, body = "data:image/png;base64,", coded
    if kind == "percent":
        head, body = "data:,", "".join(f"%{byte:02x}" for byte in data)
    limits = ("MAX_VIDEO_BYTES", "MAX_BYTES") if is_video else ("MAX_BYTES", "MAX_VIDEO_BYTES")
    monkeypatch.setattr(fetch, limits[0], 1024)
    monkeypatch.setattr(fetch, limits[1], 10)
    assert body_of(head + body, video=is_video) == data
    for module, name in (("base64", "b64decode"), ("urllib.parse", "unquote_to_bytes")):
        monkeypatch.setattr(f"{module}.{name}", lambda *_, **__: pytest.fail("it is decoded"))
    assert "the data URI is larger than" in refused(head + body + "AAAA", video=is_video)
