"""The parts of compose.yaml started for real, from Debian's PostgreSQL and this environment's MLflow.

What differs from compose: where PostgreSQL, the artifacts and the port are. Needs ``apt-get install postgresql`` and
``pip install '.[server]'``.
"""

import contextlib
import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from urllib.error import HTTPError, URLError
from urllib.request import HTTPBasicAuthHandler, HTTPPasswordMgrWithDefaultRealm, Request, build_opener, urlopen

import pytest

from diffdpo.errors import TrainingError
from diffdpo.tracking.journal import Journal
from diffdpo.tracking.mlflow_run import MlflowRun, Shipped, ship_later
from tests.docker.compose import read_compose
from tests.support.paths import ROOT
from tests.support.ports import free_port

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1500)]
PASSWORD = "made for this test only"
SECRETS = dict.fromkeys(("POSTGRES_PASSWORD", "MLFLOW_ADMIN_PASSWORD", "MLFLOW_SECRET_KEY"), PASSWORD)
BIN = Path(sys.executable).parent


def postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found or os.geteuid():
        pytest.skip("needs Debian's postgresql, and root to start it as its user")
    return found[-1].parent


@pytest.fixture(scope="module")
def postgres():
    """A server of its own as compose's: user and database mlflow, a password. Its port on 127.0.0.1."""
    programs, port = postgres_programs(), free_port()
    folder = Path(tempfile.mkdtemp(prefix="diffdpo_postgres_"))
    (folder / "password").write_text(PASSWORD)
    user = pwd.getpwnam("postgres")
    for path in (folder, folder / "password"):
        os.chown(path, user.pw_uid, user.pw_gid)

    def as_postgres(*command: str) -> None:
        subprocess.run(["runuser", "-u", "postgres", "--", *command], check=True, cwd=folder, capture_output=True)

    data, options = str(folder / "data"), f"-p {port} -c listen_addresses=127.0.0.1 -k {folder}"
    login = ("--username", "mlflow", "--auth", "scram-sha-256", "--pwfile", str(folder / "password"))
    as_postgres(str(programs / "initdb"), "--pgdata", data, *login)
    as_postgres(str(programs / "pg_ctl"), "--pgdata", data, "-w", "-l", str(folder / "log"), "-o", options, "start")
    try:
        environment = {**os.environ, "PGPASSWORD": PASSWORD}
        create = [str(programs / "createdb"), "-h", "127.0.0.1", "-p", str(port), "-U", "mlflow", "mlflow"]
        subprocess.run(create, check=True, env=environment, capture_output=True)
        yield port
    finally:
        as_postgres(str(programs / "pg_ctl"), "--pgdata", data, "-m", "immediate", "stop")
        shutil.rmtree(folder)


class Server:
    """Compose's service ``mlflow``: its address, the folder of its artifacts; killed and started again at will."""

    def __init__(self, postgres: int, folder: Path):
        self.service = read_compose(ROOT / "docker/compose.yaml", SECRETS)["services"]["mlflow"]
        self.folder, self.artifacts, self.port = folder, folder / "artifacts", free_port()
        self.address = f"http://127.0.0.1:{self.port}"
        self.there = {
            "PGHOST": "127.0.0.1",
            "PGPORT": str(postgres),
            "MLFLOW_AUTH_CONFIG_PATH": str(ROOT / "docker/basic_auth.ini"),
            "PATH": f"{BIN}:{os.environ['PATH']}",
        }

    def start(self) -> None:
        here = {"5000": str(self.port), "/artifacts": str(self.artifacts), "0.0.0.0": "127.0.0.1"}
        with (self.folder / "log").open("a") as log:
            self.process = subprocess.Popen(
                [here.get(word, word) for word in self.service["command"]],
                env={**os.environ, **self.service["environment"], **self.there},
                cwd=self.folder,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        wait_until_healthy(self.address, self.process, self.folder / "log")

    def end(self, *signals: signal.Signals) -> None:
        for sent in signals:
            with contextlib.suppress(ProcessLookupError, subprocess.TimeoutExpired):
                os.killpg(self.process.pid, sent)
                self.process.wait(20)


@pytest.fixture(scope="module")
def stack(postgres, tmp_path_factory):
    """The server, started."""
    pytest.importorskip("psycopg2", reason="pip install '.[server]'")
    pytest.importorskip("flask_wtf", reason="pip install '.[server]'")
    found = Server(postgres, tmp_path_factory.mktemp("mlflow"))
    try:
        found.start()
        yield found
    finally:
        found.end(signal.SIGTERM, signal.SIGKILL)


@pytest.fixture(scope="module")
def server(stack):
    """Its address and the folder of its artifacts."""
    return stack.address, stack.artifacts


def wait_until_healthy(address: str, process: subprocess.Popen, log: Path) -> None:
    deadline = time.monotonic() + 500
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(URLError, OSError):
            if urlopen(f"{address}/health", timeout=5).status == 200:
                return
        time.sleep(0.5)
    pytest.fail(f"the server did not start:\n{log.read_text()[-4000:]}")


def fetch(address: str, path: str, *, password: str = PASSWORD, body: dict | None = None, host: str | None = None):
    """The text at a path, as the administrator."""
    passwords = HTTPPasswordMgrWithDefaultRealm()
    passwords.add_password(None, address, "admin", password)
    request = Request(address + path, data=json.dumps(body).encode() if body is not None else None)
    request.add_header("Content-Type", "application/json")
    if host:
        request.add_header("Host", host)
    return build_opener(HTTPBasicAuthHandler(passwords)).open(request, timeout=120).read().decode()


@pytest.fixture(scope="module")
def run(server, command, python, tmp_path_factory):
    """Four steps of the bundled model, told to the server. Its output folder and what the server has of it."""
    address, _ = server
    out = tmp_path_factory.mktemp("stack") / "run"
    flags = ["--max_steps", "4", "--num_generated_pairs", "64", "--max_eval_pairs", "16", "--num_eval_problems", "2"]
    login = {"MLFLOW_TRACKING_USERNAME": "admin", "MLFLOW_TRACKING_PASSWORD": PASSWORD}
    line = [python, "launch/train.py", *flags, "--tracking_uri", address, "--output_dir", str(out)]
    line += ["--tracking_timeout", "300"]  # a busy host's server may take more than the usual 5 s for all of it
    done = command(line, timeout=400, **login)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    run_id = json.loads((out / "mlflow.json").read_text())["run_id"]
    return out, json.loads(fetch(address, f"/api/2.0/mlflow/runs/get?run_id={run_id}"))["run"]


def test_nobody_gets_in_without_the_password(server):
    address, _ = server
    for password in ("", "password1234", "admin"):
        with pytest.raises(HTTPError, match="401"):
            fetch(address, "/api/2.0/mlflow/experiments/search?max_results=1", password=password)


def test_it_answers_to_its_names_only(server):
    address, _ = server
    path = "/api/2.0/mlflow/experiments/search?max_results=1"
    assert "experiments" in fetch(address, path, host="mlflow:5000")  # as the trainer of compose calls it
    with pytest.raises(HTTPError, match="403"):
        fetch(address, path, host="elsewhere.example")


def test_every_point_of_the_journal_is_there(server, run):
    address, _ = server
    out, found = run
    assert found["info"]["status"] == "FINISHED"
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    expected: dict[str, dict[int, float]] = {}
    for line in lines:
        for name, value in line.items():
            if name not in ("step", "time") and isinstance(value, int | float):
                expected.setdefault(name, {})[line["step"]] = value
    assert len(expected) > 10 and set(expected["loss"]) == {1, 2, 3, 4}
    for name, points in expected.items():
        path = f"/api/2.0/mlflow/metrics/get-history?run_id={found['info']['run_id']}&metric_key={name}"
        history = {int(point["step"]): point["value"] for point in json.loads(fetch(address, path))["metrics"]}
        assert history == pytest.approx(points), name


def test_its_files_are_in_the_store_and_come_back(server, run):
    address, artifacts = server
    _, found = run
    listed = json.loads(fetch(address, f"/api/2.0/mlflow/artifacts/list?run_id={found['info']['run_id']}"))
    assert {"config.yaml", "summary.json", "plots"} <= {file["path"] for file in listed["files"]}
    assert list(artifacts.rglob("summary.json"))


def test_the_page_opens(server, run):
    page = fetch(server[0], "/")
    assert "<title>MLflow</title>" in page and "<script" in page


def test_it_is_all_in_postgresql(server, run, postgres):
    import psycopg2

    login = {"host": "127.0.0.1", "port": postgres, "user": "mlflow", "password": PASSWORD, "dbname": "mlflow"}
    with contextlib.closing(psycopg2.connect(**login)) as connection, connection.cursor() as cursor:
        cursor.execute("select count(*) from metrics where run_uuid = %s and key = 'loss'", (run[1]["info"]["run_id"],))
        assert cursor.fetchone() == (4,)
        cursor.execute("select username, password_hash from users")
        users = cursor.fetchall()
    assert [name for name, _ in users] == ["admin"] and PASSWORD not in users[0][1]


def test_a_server_that_is_killed_and_started_again_loses_no_point(stack, tmp_path, monkeypatch):
    """And holds no step up; and no file of the run has the password."""
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    journal = Journal(tmp_path)
    run = MlflowRun(tmp_path, Shipped(stack.address, "killed", "run"))
    run.start()
    slowest = 0.0
    for step in range(1, 61):
        if step == 20:
            stack.end(signal.SIGKILL)
        if step == 40:
            stack.start()
        began = time.monotonic()
        journal.write(step, {"loss": 1 / step})
        slowest = max(slowest, time.monotonic() - began)
        time.sleep(0.2)
    journal.close()
    assert run.close("FINISHED", timeout=300) and slowest < 1
    path = f"/api/2.0/mlflow/metrics/get-history?run_id={run.shipped.run_id}&metric_key=loss"
    points = [(int(one["step"]), one["value"]) for one in json.loads(fetch(stack.address, path))["metrics"]]
    assert sorted(points) == [(step, pytest.approx(1 / step)) for step in range(1, 61)]
    assert not [file for file in tmp_path.rglob("*") if file.is_file() and PASSWORD.encode() in file.read_bytes()]


def test_a_wrong_password_takes_nothing_of_the_run_away(stack, tmp_path, monkeypatch):
    Journal(tmp_path).write(1, {"loss": 1.0})
    Shipped(stack.address, "killed", "other", status="FINISHED").write(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "admin")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "wrong")
    with pytest.raises(TrainingError) as caught:
        ship_later(tmp_path)
    assert "wrong" not in str(caught.value)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    assert ship_later(tmp_path) == 1
