"""A small stand-in for the Hugging Face hub, on this machine."""

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
