"""What several test packages share: a tiny model on disk, real data, and commands with a time limit."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.support.paths import ROOT
from tests.support.ports import free_port

os.environ.setdefault("OMP_NUM_THREADS", "1")  # several processes on two cores


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """A folder with a random model of 2 layers whose tokenizer knows the generated problems."""
    from data_pipeline.generate import generate_corpus
    from diffdpo.models.architecture.from_scratch import new_model, train_tokenizer
    from diffdpo.models.load import save_model

    texts = [record["prompt"] + record["completion"] for record in generate_corpus(500, seed=0)]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    folder = tmp_path_factory.mktemp("tiny_model")
    save_model(new_model(tokenizer, width=32, layers=2, heads=2, seed=0), tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def pairs_file(tmp_path_factory) -> Path:
    """64 generated pairs as JSON lines."""
    from data_pipeline.generate import generate_pairs

    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in generate_pairs(64, seed=0)))
    return path


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real preference data; its tests run where DIFFDPO_REAL_DATA names it."""
    folder = os.environ.get("DIFFDPO_REAL_DATA")
    if not folder:
        pytest.skip("DIFFDPO_REAL_DATA is not set")
    return Path(folder)


def run_command(command: list[str], *, timeout: float = 300, cwd: Path = ROOT, **env: str):
    """Run a command from the project's root; on a time-out it and all its children are killed and the test fails."""
    environment = {**os.environ, "MPLBACKEND": "Agg", **env}
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        environment.pop(name, None)
    environment.update(env)
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        out, err = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        out, err = process.communicate()
        pytest.fail(f"{' '.join(command)} ran longer than {timeout} s\n{out[-2000:]}\n{err[-2000:]}")
    return subprocess.CompletedProcess(command, process.returncode, out, err)


@pytest.fixture(scope="session")
def command() -> Callable[..., subprocess.CompletedProcess]:
    """``run_command``."""
    return run_command


@pytest.fixture(name="free_port")
def one_free_port() -> int:
    """A port that nobody listens on."""
    return free_port()


@pytest.fixture(scope="session")
def python() -> str:
    """This interpreter."""
    return sys.executable
