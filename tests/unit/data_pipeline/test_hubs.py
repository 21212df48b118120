"""s3:// against moto's S3 server, hf:// and names of data sets against a small stand-in for the hub, all local.

Both in processes of their own, as the addresses of such services are read when their libraries are imported.
"""

import json
import os
import shutil
import subprocess
import sys
import threading
import zlib
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlparse

import pytest

from data_pipeline.build import BuildOptions, build
from tests.conftest import ROOT

REVISION = "0123456789abcdef0123456789abcdef01234567"
READ = """
import json, sys
from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.stream import RecordReader
def ids(source):
    try:
        dataset = open_dataset(source, cache_dir=sys.argv[1])
    except DataError as error:
        return str(error)
    reader = RecordReader(dataset)
    return [reader(number).id for number in range(len(dataset))]
for source in sys.argv[2:]:
    print(json.dumps(ids(source)))
"""
IDS = [f"r{i}" for i in range(20)]


@pytest.fixture
def bucket(tmp_path, jsonl, make_rows):
    """A folder to serve: ``pairs/`` made by build, and ``part-0.jsonl``, ``part-1.jsonl`` with the same records."""
    folder = tmp_path / "bucket"
    folder.mkdir()
    parts = [str(jsonl(folder / f"part-{i}.jsonl", make_rows(10, start=10 * i))) for i in range(2)]
    build(parts, folder / "pairs", BuildOptions(shard_size=8))
    return folder


def read_elsewhere(cache, *sources, **environment):
    """The ids behind each source, or the error's text, read by a fresh process."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "HF_"))}
    done = subprocess.run(
        [sys.executable, "-c", READ, str(cache), *sources],
        env={**clean, "PYTHONPATH": str(ROOT), "HF_HOME": str(cache / "hub"), **environment},
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def test_s3(bucket, cache):
    moto, _ = pytest.importorskip("moto.server"), pytest.importorskip("s3fs")
    server = moto.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    try:
        host, port = server.get_host_and_port()
        access = {"AWS_ACCESS_KEY_ID": "a", "AWS_SECRET_ACCESS_KEY": "b", "AWS_DEFAULT_REGION": "us-east-1"}
        access["AWS_ENDPOINT_URL"] = f"http://{host}:{port}"
        _upload(bucket, "corpus", access)
        ways = ("pairs", "pairs/*.tar", "pairs/shard-{00000..00002}.tar", "part-*.jsonl", "part-{0,1}.jsonl")
        found = read_elsewhere(cache, *(f"s3://corpus/{way}" for way in ways), "s3://corpus/absent.jsonl", **access)
    finally:
        server.stop()
    assert found == [IDS] * len(ways) + ["s3://corpus/absent.jsonl does not exist"]


def _upload(folder: Path, name: str, access: dict) -> None:
    script = (
        "import sys, s3fs; fs = s3fs.S3FileSystem(); fs.mkdir(sys.argv[2])\n"
        "fs.put(sys.argv[1] + '/', sys.argv[2] + '/', recursive=True)"
    )
    subprocess.run(
        [sys.executable, "-c", script, str(folder), name], env={**os.environ, **access}, check=True, timeout=120
    )


class Hub(BaseHTTPRequestHandler):
    """The few questions of the hub's interface that huggingface_hub asks to list and read a data set ``org/set``."""

    protocol_version = "HTTP/1.1"

    def do_GET(self):
        path = unquote(urlparse(self.path).path)
        base = f"/api/datasets/{self.server.name}"
        if path in (base, f"{base}/revision/main", f"{base}/revision/{REVISION}"):
            self._json({"id": self.server.name, "sha": REVISION, "siblings": [{"rfilename": f} for f in self._names()]})
        elif path.startswith(f"{base}/tree/"):
            inside = "/".join(path.removeprefix(f"{base}/tree/").split("/")[1:])
            self._json([self._entry(f) for f in self._names(dirs=True) if f.startswith(inside)])
        elif path.startswith(f"/datasets/{self.server.name}/resolve/"):
            self._file(self.server.folder / "/".join(path.split("/")[6:]))
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


@pytest.fixture
def hub(bucket):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.folder, server.name = bucket, "org/set"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def test_hf_urls(hub, cache):
    ways = ("pairs", "pairs/*.tar", "pairs/shard-{00000..00002}.tar", "part-*.jsonl", "part-{0,1}.jsonl")
    endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    found = read_elsewhere(
        cache, *(f"hf://datasets/org/set/{way}" for way in ways), "hf://datasets/no/one/a.jsonl", **endpoint
    )
    assert found == [IDS] * len(ways) + ["hf://datasets/no/one/a.jsonl does not exist"]


@pytest.mark.slow  # ten seconds of imports; the default run has the same with a stand-in for `datasets`
def test_a_data_set_by_name(hub, cache):
    shutil.rmtree(hub.folder / "pairs")
    endpoint = {"HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}"}
    found, refused, absent = read_elsewhere(cache, "org/set", "org/set:test", "no/one", **endpoint)
    assert found == IDS
    assert refused.startswith("'org/set' is no file or folder here, and as a data set on the hub (split 'test')")
    assert absent.endswith("the hub has no data set of this name, or does not show it to you")
    # of another cache of ours, so that it is built again from what `datasets` has kept of it
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(cache / "hub")}
    kept, absent = read_elsewhere(cache / "other", "org/set", "no/one", **away)
    assert kept == IDS
    assert "no copy is kept here, and the hub does not answer" in absent
