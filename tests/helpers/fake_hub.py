"""A hub on this machine: as much of its protocol as an upload and a download need."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_" + "a" * 34


class FakeHub(ThreadingHTTPServer):
    """Repositories as files by name; `refuse` gives a status to paths that contain a text."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.stored: dict[str, bytes] = {}  # large files by their sum
        self.commits: list[list[dict[str, Any]]] = []
        self.refuse: dict[str, int] = {}
        self.asked: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_args: object) -> None:
        pass

    def answer(self, values: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        body = values if isinstance(values, bytes) else json.dumps(values).encode()
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_any(self) -> None:
        hub, path = self.server, self.path.split("?")[0]
        hub.asked.append(f"{self.command} {path}")
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        for text, status in hub.refuse.items():
            if text in path:
                return self.answer({"error": f"no {text}"}, status)
        if "/lfs-store/" in path:
            assert hashlib.sha256(body).hexdigest() == path.rsplit("/", 1)[1]
            hub.stored[path.rsplit("/", 1)[1]] = body
            return self.answer({})
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self.answer({"error": "Invalid credentials"}, 401)
        return self.answer(*self.api(path, body))

    do_GET = do_POST = do_PUT = do_HEAD = handle_any  # noqa: N815

    def api(self, path: str, body: bytes) -> tuple[Any, int, dict[str, str]]:
        """What the hub answers, its status, and headers."""
        name = next((one for one in self.server.repos if path.startswith(f"/{one}/resolve/")), "")
        if not name:
            return *self.answer_api(path, body), {}
        data = self.server.repos[name].get(path.partition("/resolve/")[2].partition("/")[2])
        if data is None:
            return {"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"}
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return data, 200, {"ETag": etag, "X-Repo-Commit": "1" * 40}

    def answer_api(self, path: str, body: bytes) -> tuple[Any, int]:
        """What the hub answers to a question about a repository, and its status."""
        hub = self.server
        if path == "/api/whoami-v2":
            return {"name": "owner", "type": "user", "auth": {}}, 200
        if path == "/api/validate-yaml":
            return {"errors": [], "warnings": []}, 200
        if path == "/api/repos/create":
            values = json.loads(body)
            name = f"{values.get('organization') or 'owner'}/{values['name']}"
            found = name in hub.repos
            hub.repos.setdefault(name, {".gitattributes": b""})
            hub.private.setdefault(name, _wants_private(values))
            return {"url": f"{hub.url}/{name}", "name": name}, 409 if found else 200
        name = next((one for one in hub.repos if f"/{one}" in path), "")
        if not name:
            return {"error": "Repository not found"}, 404
        files = hub.repos[name]
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{hub.url}/lfs-store/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return {"transfer": "basic", "objects": objects}, 200
        if "/preupload/" in path:
            kinds = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for one in json.loads(body)["files"]
            ]
            return {"files": kinds}, 200
        if "/tree/" in path:
            tree = [
                {"type": "file", "path": key, "size": len(data), "oid": "0" * 40}
                for key, data in files.items()
            ]
            return tree, 200
        if "/commit/" in path:
            self.commit(files, [json.loads(line) for line in body.splitlines()])
            sha = f"{len(hub.commits):040x}"
            return {"commitUrl": f"{hub.url}/{name}/commit/{sha}", "commitOid": sha}, 200
        siblings = [{"rfilename": file} for file in files]
        private = hub.private.get(name, False)
        return {"id": name, "sha": "1" * 40, "siblings": siblings, "private": private}, 200

    def commit(self, files: dict[str, bytes], lines: list[dict[str, Any]]) -> None:
        """Change `files` as the lines of a commit say, all at once."""
        self.server.commits.append(lines)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.stored[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]


def _wants_private(values: dict[str, Any]) -> bool:
    """Whether a request to make a repository asks for a private one."""
    return bool(values.get("private")) or values.get("visibility") == "private"


@contextmanager
def running() -> Iterator[FakeHub]:
    """A hub that answers until the block ends."""
    hub = FakeHub()
    thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        thread.join()
        hub.server_close()
