"""Runs of ``launch/train.py`` as forked processes: torch and DeepSpeed are imported once, so that a kill is a matter of
seconds. What is forked is the command itself, with a launcher's environment and pids of its own."""

import contextlib
import hashlib
import json
import os
import resource
import signal
import socket
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.support.paths import ROOT

ENGINES = {  # name: (processes, flags)
    "plain x1": (1, ()),
    "plain x2": (2, ()),
    "ZeRO-2 offload": (1, ("--ds_config", "ds_configs/4080_offload.json")),
    "ZeRO-3 x2": (2, ("--ds_config", "ds_configs/zero3.json")),
    "FSDP2 x2": (2, ("--engine", "fsdp2")),
}
STEPS = 16
FLAGS = (
    *("--max_steps", str(STEPS), "--save_steps", "2", "--learning_rate", "1e-3", "--tracking_uri", "none"),
    *("--max_length", "128", "--max_prompt_length", "64", "--max_eval_pairs", "4", "--num_eval_problems", "0"),
    *("--num_mc_samples", "2", "--dataset_num_workers", "0", "--resume_from_checkpoint", "auto"),
)


def flags_for(engine: str, model: Path, data: Path, out: Path) -> list[str]:
    """The constant command of a supervisor: 8 records a step whatever the number of processes."""
    processes, more = ENGINES[engine]
    batch = str(8 // processes)
    named = ["--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(out)]
    return [*named, *FLAGS, "--per_device_train_batch_size", batch, *more]


@dataclass
class Started:
    """A run's processes."""

    pids: list[int]
    log: Path
    codes: dict[int, int] = field(default_factory=dict)  # pid -> exit code, or minus the signal

    def poll(self) -> bool:
        """Whether all have ended."""
        for pid in self.pids:
            if pid not in self.codes:
                with contextlib.suppress(ChildProcessError):
                    ended, status = os.waitpid(pid, os.WNOHANG)
                    if ended:
                        self.codes[pid] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self.pids)

    def wait(self, seconds: float) -> bool:
        """Until all have ended, at most so long; whether they have."""
        until = time.monotonic() + seconds
        while not self.poll():
            if time.monotonic() > until:
                return False
            time.sleep(0.005)
        return True

    def kill(self, which: Sequence[int], how: int = signal.SIGKILL) -> None:
        for pid in which:
            if pid not in self.codes:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, how)


def start(arguments: list[str], processes: int, log: Path, *, file_limit: int | None = None) -> Started:
    """Fork ``launch/train.py`` on so many ranks. ``file_limit``: bytes a file of theirs may have, as on a full disk."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    pids = []
    sys.stdout.flush()
    for rank in range(processes):
        pid = os.fork()
        if pid == 0:
            _become_rank(arguments, rank, processes, port, log, file_limit)
        pids.append(pid)
    return Started(pids, log)


def _become_rank(arguments, rank, processes, port, log, file_limit) -> None:
    code = 70
    try:
        os.setsid()
        os.chdir(ROOT)
        file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(file, 1)
        os.dup2(file, 2)
        if file_limit is not None:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
        if processes > 1:
            os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(processes))
            os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), LOCAL_WORLD_SIZE=str(processes))
        import tqdm

        # its own is a semaphore that all forks share: a run killed while it draws its bar would hold the next ones
        tqdm.tqdm.set_lock(threading.RLock())
        from diffdpo import command
        from diffdpo.cli import train

        sys.argv = ["launch/train.py", *arguments]
        command.run(train.main)
    except SystemExit as end:
        code = int(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def preload() -> None:
    """Import what every run imports, before it is forked."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    import diffdpo.training.preference  # noqa: F401
    from diffdpo.engine.deepspeed import import_deepspeed

    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import_deepspeed()


def curve(out: Path) -> list[tuple[int, float, float]]:
    """(step, loss, gradient norm) of every line, to the bit."""
    path = out / "metrics.jsonl"
    lines = [json.loads(line) for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b"}\n")]
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]


def lines(out: Path) -> int:
    """How many whole lines the journal has: for those who look often, at a journal that grows."""
    path = out / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def held_out(out: Path) -> dict:
    """What was measured before and after."""
    return json.loads((out / "summary.json").read_text())["held_out"]


def weights(out: Path) -> str:
    """A sum over the final model."""
    return hashlib.sha256((out / "final" / "model.safetensors").read_bytes()).hexdigest()


def make_inputs(folder: Path, *, width: int = 32, layers: int = 2) -> tuple[Path, Path]:
    """A tiny model and generated pairs."""
    from data_pipeline.generate import generate_corpus, generate_pairs
    from diffdpo.models.architecture.from_scratch import new_model, train_tokenizer
    from diffdpo.models.load import save_model

    texts = [record["prompt"] + record["completion"] for record in generate_corpus(500, seed=0)]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    save_model(new_model(tokenizer, width=width, layers=layers, heads=2, seed=0), tokenizer, folder / "model")
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in generate_pairs(64, seed=0)))
    return folder / "model", data
