"""s3:// against moto's S3 server, hf:// and names of data sets against a small stand-in for the hub, all local.

Both in processes of their own, as the addresses of such services are read when their libraries are imported.
"""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from data_pipeline.shard_builder import BuildOptions, build
from tests.support.hub import hub_with
from tests.support.paths import ROOT

READ = """
import json, sys
from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.stages import RecordReader
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


@pytest.fixture
def hub(bucket):
    with hub_with(bucket, "org/set", "dataset") as address:
        yield address


def test_hf_urls(hub, cache):
    ways = ("pairs", "pairs/*.tar", "pairs/shard-{00000..00002}.tar", "part-*.jsonl", "part-{0,1}.jsonl")
    endpoint = {"HF_ENDPOINT": hub}
    found = read_elsewhere(
        cache, *(f"hf://datasets/org/set/{way}" for way in ways), "hf://datasets/no/one/a.jsonl", **endpoint
    )
    assert found == [IDS] * len(ways) + ["hf://datasets/no/one/a.jsonl does not exist"]


@pytest.mark.slow  # ten seconds of imports; the default run has the same with a stand-in for `datasets`
def test_a_data_set_by_name(bucket, hub, cache):
    shutil.rmtree(bucket / "pairs")
    endpoint = {"HF_ENDPOINT": hub}
    found, refused, absent = read_elsewhere(cache, "org/set", "org/set:test", "no/one", **endpoint)
    assert found == IDS
    assert refused.startswith("'org/set' is no file or folder here, and as a data set on the hub (split 'test')")
    assert absent.endswith("the hub has no data set of this name, or does not show it to you")
    # of another cache of ours, so that it is built again from what `datasets` has kept of it
    away = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HOME": str(cache / "hub")}
    kept, absent = read_elsewhere(cache / "other", "org/set", "no/one", **away)
    assert kept == IDS
    assert "no copy is kept here, and the hub does not answer" in absent
