"""A store behind a gateway that asks for a token: it gets in by the environment, and no file and no line has it."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from urllib.request import urlopen

import pytest

from diffdpo.errors import TrainingError
from diffdpo.settings.credentials import TOKEN
from diffdpo.tracking.journal import Journal
from diffdpo.tracking.mlflow_run import Shipped, ship_later
from tests.support.paths import ROOT
from tests.support.ports import free_port
from tests.support.token_proxy import token_proxy

SECRET = "t0ken-of-alice"


def with_the_secret(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and SECRET.encode() in path.read_bytes()]


def test_the_token_reaches_the_gateway_and_stays_out_of_errors_and_files(tmp_path, monkeypatch):
    Journal(tmp_path).write(1, {"loss": 1.0})
    answered: list[int] = []
    with token_proxy("http://127.0.0.1:9", SECRET, answered) as address:
        Shipped(address, "token", "run", status="FINISHED").write(tmp_path)
        for token, status in (("another", 401), (SECRET, 502)):
            monkeypatch.setenv(TOKEN, token)
            with pytest.raises(TrainingError) as caught:
                ship_later(tmp_path)
            assert set(answered) == {status} and token not in str(caught.value)
            answered.clear()
    assert not with_the_secret(tmp_path)


@pytest.fixture
def mlflow_server(tmp_path):
    """A real one, with a file as its database. Its address."""
    folder, port = tmp_path / "server", free_port()
    folder.mkdir()
    program = [str(Path(sys.executable).with_name("mlflow")), "server", "--host", "127.0.0.1", "--port", str(port)]
    program += [
        "--backend-store-uri",
        f"sqlite:///{folder}/mlflow.db",
        "--artifacts-destination",
        str(folder / "files"),
    ]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(program, cwd=folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True)
    address = f"http://127.0.0.1:{port}"
    try:
        until = time.monotonic() + 400
        while process.poll() is None and time.monotonic() < until:
            with suppress(OSError):
                if urlopen(f"{address}/health", timeout=5).status == 200:
                    break
            time.sleep(0.5)
        yield address
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


@pytest.mark.slow
@pytest.mark.timeout(1200)
def test_a_run_through_the_gateway_and_one_without_the_token(mlflow_server, command, tiny_model, pairs_file, tmp_path):
    flags = ["--model_name_or_path", str(tiny_model), "--train_data", str(pairs_file), "--max_steps", "3"]
    flags += ["--per_device_train_batch_size", "1", "--num_eval_problems", "0", "--eval_fraction", "0.1"]
    answered: list[int] = []
    with token_proxy(mlflow_server, SECRET, answered) as address:
        said = ""
        for name, token in (("with", SECRET), ("without", "")):
            line = [sys.executable, "launch/train.py", *flags, "--tracking_uri", address, "--run_name", name]
            line += ["--output_dir", str(tmp_path / "runs" / name), "--tracking_timeout", "200" if token else "2"]
            done = command(line, timeout=500, **{TOKEN: token})
            assert done.returncode == 0, done.stderr
            said += done.stdout + done.stderr
            assert (401 in answered) == (not token)
        assert "NOT all of it arrived" in said and SECRET not in said
        send = [sys.executable, "-m", "diffdpo.tracking", str(tmp_path / "runs" / "without")]
        assert command(send, timeout=200, cwd=ROOT, **{TOKEN: SECRET}).returncode == 0
    for name in ("with", "without"):
        run_id = json.loads((tmp_path / "runs" / name / "mlflow.json").read_text())["run_id"]
        found = json.load(urlopen(f"{mlflow_server}/api/2.0/mlflow/runs/get?run_id={run_id}", timeout=60))["run"]
        assert found["info"]["status"] == "FINISHED"
        path = f"{mlflow_server}/api/2.0/mlflow/metrics/get-history?run_id={run_id}&metric_key=loss"
        points = json.load(urlopen(path, timeout=60))["metrics"]
        assert sorted(int(point["step"]) for point in points) == [1, 2, 3]
    assert not with_the_secret(tmp_path / "runs")
