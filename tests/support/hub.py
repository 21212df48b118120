"""A small stand-in for the Hugging Face hub, on this machine."""

import base64
import json
import threading
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

REVISION = "0123456789abcdef0123456789abcdef01234567"


@contextmanager
def hub_with(folder: Path, name: str, kind: str) -> Iterator[str]:
    """The address of a hub that has one ``model`` or ``dataset``: the files of a folder."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.name, server.kind = folder, name, kind
    with _serving(server) as address:
        yield address


@contextmanager
def hub_to_write(folder: Path, *, user: str, token: str) -> Iterator[ThreadingHTTPServer]:
    """A hub on which one user, who has the token, can make one model; its files come into the folder. The server:
    ``address``, and of the model its ``name`` and ``made``, what was asked for it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), HubToWrite)
    server.folder, server.name, server.kind = folder, "", "model"
    server.user, server.token, server.made = user, token, []
    with _serving(server) as server.address:
        yield server


@contextmanager
def _serving(server: ThreadingHTTPServer) -> Iterator[str]:
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class Hub(BaseHTTPRequestHandler):
    """The few questions of the hub's interface that huggingface_hub asks to list and read ``server.name``."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        base = f"/api/{self.server.kind}s/{self.server.name}"
        if path in (base, f"{base}/revision/main", f"{base}/revision/{REVISION}"):
            self._json({"id": self.server.name, "sha": REVISION, "siblings": [{"rfilename": f} for f in self._names()]})
        elif path.startswith(f"{base}/revision/"):
            self._json({"error": "Revision not found"}, 404, {"X-Error-Code": "RevisionNotFound"})
        elif path.startswith(f"{base}/tree/"):
            inside = "/".join(path.removeprefix(f"{base}/tree/").split("/")[1:])
            self._json([self._entry(f) for f in self._names(dirs=True) if f.startswith(inside)])
        elif f"/{self.server.name}/resolve/" in path:
            self._file(self.server.folder / path.split("/resolve/")[1].partition("/")[2])
        else:
            self._json({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})

    do_HEAD = do_GET

    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = json.loads(body)["paths"] if body.startswith("{") else []
        self._json([self._entry(f) for f in self._names(dirs=True) if f in asked])

    def _names(self, dirs=False):
        paths = sorted(self.server.folder.rglob("*"))
        return [str(p.relative_to(self.server.folder)) for p in paths if dirs or p.is_file()]

    def _entry(self, name):
        path = self.server.folder / name
        if path.is_dir():
            return {"type": "directory", "path": name, "oid": "0" * 40}
        return {"type": "file", "path": name, "oid": "1" * 40, "size": path.stat().st_size}

    def _file(self, path):
        if not path.is_file():
            self._json({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
            return
        data, code, headers = (
            path.read_bytes(),
            200,
            {"ETag": f'"{zlib.crc32(path.read_bytes())}"', "X-Repo-Commit": REVISION},
        )
        if ranged := self.headers.get("Range"):
            first, _, last = ranged.removeprefix("bytes=").partition("-")
            headers["Content-Range"] = f"bytes {first}-{last or len(data) - 1}/{len(data)}"
            data, code = data[int(first) : int(last) + 1 if last else None], 206
        self._send(data, code, headers)

    def _json(self, value, code=200, headers=None):
        self._send(json.dumps(value).encode(), code, {"Content-Type": "application/json", **(headers or {})})

    def _send(self, data, code, headers):
        self.send_response(code)
        for name, value in {**headers, "Content-Length": str(len(data)), "Accept-Ranges": "bytes"}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *_):
        pass


class HubToWrite(Hub):
    """What huggingface_hub asks when it makes a repository and puts a folder into it, each file as text in a commit."""

    def do_GET(self):
        if self.path == "/api/whoami-v2":
            self._json({"type": "user", "name": self.server.user}) if self._known() else self._refuse()
        else:
            super().do_GET()

    do_HEAD = do_GET

    def do_POST(self):
        if not self._known():
            self.rfile.read(int(self.headers["Content-Length"]))
            self._refuse()
        elif self.path == "/api/repos/create":
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            self.server.made.append(asked)
            self.server.name = f"{asked.get('organization') or self.server.user}/{asked['name']}"
            self._json({"url": f"{self.server.address}/{self.server.name}", "name": self.server.name})
        elif self.path.endswith("/preupload/main"):
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["files"]
            keep = {"uploadMode": "regular", "shouldIgnore": False, "oid": None}
            self._json({"files": [{"path": file["path"], **keep} for file in asked]})
        elif self.path == f"/api/models/{self.server.name}/commit/main":
            self._commit(self.rfile.read(int(self.headers["Content-Length"])).decode())
        elif self.path == "/api/validate-yaml":
            self.rfile.read(int(self.headers["Content-Length"]))
            self._json({"warnings": [], "errors": []})
        else:
            super().do_POST()

    def _commit(self, lines):
        for line in map(json.loads, lines.splitlines()):
            if line["key"] == "file":
                path = self.server.folder / line["value"]["path"]
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(base64.b64decode(line["value"]["content"]))
        url = f"{self.server.address}/{self.server.name}/commit/{REVISION}"
        self._json({"success": True, "commitUrl": url, "commitOid": REVISION})

    def _known(self):
        return self.headers.get("Authorization") == f"Bearer {self.server.token}"

    def _refuse(self):
        self._json({"error": f"Invalid credentials {self.headers.get('Authorization')}"}, 401)
