"""The job scripts: linted, and the very commands that they would start."""

import json
import shlex
import signal
import sys
import time
from pathlib import Path

import pytest

from tests.cluster.lines import knows_auto, train_config
from tests.cluster.slurm import Job, directives, install, start
from tests.support.paths import ROOT

FOLDER = ROOT / "launch/slurm"
SCRIPTS = sorted(FOLDER.glob("*.sbatch"))
SHELL = [*SCRIPTS, *sorted(FOLDER.glob("*.sh"))]
MULTI = "launch/slurm/multi_node.sbatch"
SINGLE = "launch/slurm/single_node.sbatch"
SHORT = ["--num_generated_pairs", "64", "--max_eval_pairs", "16", "--num_eval_problems", "0", "--tracking_uri", "none"]


@pytest.fixture
def slurm(tmp_path):
    """Runs a job script under the stubs."""

    def run(script: str, *words: str, **more) -> Job:
        options = {name: more.pop(name) for name in list(more) if name.islower()}
        return start(install(tmp_path), script, *words, environment=more, **options)[1]()

    return run


@pytest.mark.parametrize("path", SHELL, ids=lambda path: path.name)
def test_shellcheck_finds_nothing(command, path):
    shellcheck = str(Path(sys.executable).with_name("shellcheck"))
    done = command([shellcheck, "--external-sources", str(path)], timeout=60)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_directives_ask_for_a_grace_and_a_place_in_the_queue(path):
    asked = directives(path)
    assert asked["signal"] == "B:TERM@120" and "requeue" in asked and asked["open-mode"] == "append"


def test_ranks_of_one_node(slurm):
    job = slurm(SINGLE, "--beta", "0.3", SLURM_CPUS_PER_TASK="8")
    (step,) = job.steps
    assert step["words"][:2] == ["launch/slurm/rank.sh", "python"]
    config = train_config(step["words"])
    assert config.beta == 0.3 and config.ds_config == "ds_configs/zero2.json"
    assert config.output_dir == "outputs/slurm-4711" and config.resume_from_checkpoint == "auto"
    environment = step["environment"]
    assert environment["OMP_NUM_THREADS"] == "8" and environment["NCCL_DEBUG"] == "WARN"
    assert environment["SRUN_CPUS_PER_TASK"] == "8"  # srun does not read sbatch's own any more
    assert (environment["MASTER_ADDR"], environment["MASTER_PORT"]) == ("localhost", "24711")
    assert job.code == 0 and job.requeued == []


def test_several_nodes_through_torchrun(slurm):
    (step,) = slurm(MULTI, hosts="one,two", LAUNCHER="torchrun").steps
    assert {"--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64"} <= set(step["options"])
    from torch.distributed.run import get_args_parser

    assert step["words"][0] == "torchrun"
    asked = get_args_parser().parse_args(step["words"][1:])
    assert (asked.nnodes, asked.nproc_per_node, asked.rdzv_id) == ("2", "8", "4711")
    assert (asked.rdzv_backend, asked.rdzv_endpoint, asked.shutdown_timeout) == ("c10d", "one:24711", 110)
    assert asked.training_script == "launch/train.py"
    assert train_config(step["words"]).ds_config == "ds_configs/zero3.json"


def test_several_nodes_through_deepspeed(slurm):
    (step,) = slurm(MULTI, hosts="one,two", LAUNCHER="deepspeed").steps
    bash, c, inner, hostfile, *line = step["words"]
    assert (bash, c) == ("bash", "-c")
    try:
        assert (ROOT / hostfile).read_text().split("\n") == ["one slots=8", "two slots=8", ""]
    finally:
        (ROOT / hostfile).unlink()
    from deepspeed.launcher.runner import parse_args

    names = {"$0": hostfile, "$SLURM_NODEID": "1", "$MASTER_ADDR": "one", "$MASTER_PORT": "24711"}
    words = [names.get(word, word) for word in shlex.split(inner.removesuffix('"$@"'))]
    assert words[:2] == ["exec", "deepspeed"]
    asked = parse_args([*words[2:], *line])
    assert (asked.hostfile, asked.no_ssh, asked.node_rank) == (hostfile, True, 1)
    assert (asked.master_addr, asked.master_port, asked.user_script) == ("one", 24711, "launch/train.py")
    assert train_config(line).ds_config == "ds_configs/zero3.json"


def test_another_launcher_is_refused(slurm):
    job = slurm(SINGLE, LAUNCHER="mpirun")
    assert job.code == 2 and "LAUNCHER is mpirun; allowed: srun, torchrun, deepspeed" in job.said and not job.steps


def test_inside_containers(slurm):
    (step,) = slurm(SINGLE, PYXIS_IMAGE="registry#diffdpo:gpu").steps
    assert {"--container-image=registry#diffdpo:gpu", f"--container-workdir={ROOT}"} <= set(step["options"])
    step = slurm(SINGLE, APPTAINER_IMAGE="diffdpo.sif").steps[-1]
    inside = ["apptainer", "exec", "--nv", "--bind", str(ROOT), "--pwd", str(ROOT), "diffdpo.sif", "python"]
    assert step["words"][: len(inside) + 1] == ["launch/slurm/rank.sh", *inside]


def test_a_run_for_every_line_of_a_sweep(slurm):
    lines = [line for line in (FOLDER / "sweep.example").read_text().splitlines() if not line.startswith("#")]
    assert directives(FOLDER / "sweep_array.sbatch")["array"] == f"0-{len(lines) - 1}%2"
    for n, line in enumerate(lines):
        given = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": str(n)}
        words = ["launch/slurm/sweep.example", "--beta", "9", "--num_mc_samples", "2"]
        step = slurm("launch/slurm/sweep_array.sbatch", *words, **given).steps[-1]
        config = train_config(step["words"])
        assert step["words"][-len(line.split()) :] == line.split() and config.num_mc_samples == 2
        assert config.beta == float(line.split()[line.split().index("--beta") + 1])
        assert config.output_dir == f"outputs/sweep-4700/{n}"
    given = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": str(len(lines))}
    job = slurm("launch/slurm/sweep_array.sbatch", "launch/slurm/sweep.example", **given)
    assert job.code == 2 and "has no line 4" in job.said


def test_a_line_of_a_sweep_is_read_as_a_shell_reads_it(slurm, tmp_path):
    flags, file = ["--data_cache", "/a folder/x", "--eval_task", "regex:(\\d+)"], tmp_path / "flags"
    file.write_text(f"# a comment\n{shlex.join(flags)}\n")
    given = {"SLURM_ARRAY_JOB_ID": "4700", "SLURM_ARRAY_TASK_ID": "0"}
    step = slurm("launch/slurm/sweep_array.sbatch", str(file), **given).steps[-1]
    assert step["words"][-4:] == flags
    file.write_text("# nothing\n")
    job = slurm("launch/slurm/sweep_array.sbatch", str(file), **given)
    assert job.code == 2 and "has no line 0" in job.said
    job = slurm("launch/slurm/sweep_array.sbatch", **given)
    assert job.code == 2 and "is no file of flags" in job.said


@pytest.mark.parametrize("script", [SINGLE, MULTI])
def test_other_engines_than_deepspeed(slurm, script):
    for words, environment in ((["--engine", "fsdp2"], {}), ([], {"DS_CONFIG": ""})):
        step = slurm(script, *words, **environment).steps[-1]
        config = train_config(step["words"])
        assert config.ds_config is None and config.engine == ("fsdp2" if words else "auto")
    step = slurm(script, DS_CONFIG="ds_configs/zero1.json").steps[-1]
    assert train_config(step["words"]).ds_config == "ds_configs/zero1.json"


@pytest.mark.parametrize(
    ("code", "state", "requeued"),
    [
        ("0", "RUNNING", []),
        ("3", "RUNNING", ["4711"]),
        ("3", "CANCELLED", []),
        ("4", "RUNNING", ["4711"]),
        ("4", "CANCELLED", []),
        ("1", "RUNNING", []),
        ("2", "RUNNING", []),
        ("130", "RUNNING", []),
    ],
)
def test_a_stopped_run_goes_back_into_the_queue(slurm, code, state, requeued):
    job = slurm(SINGLE, SRUN_CODE=code, JOB_STATE=state)
    assert job.requeued == requeued and job.code == int(code)


@pytest.mark.parametrize(("code", "before", "requeued"), [("4", "2", ["4711"]), ("4", "3", []), ("3", "30", ["4711"])])
def test_a_run_that_hangs_everywhere_does_not_go_round_for_ever(slurm, code, before, requeued):
    assert slurm(SINGLE, SRUN_CODE=code, SLURM_RESTART_COUNT=before).requeued == requeued


@pytest.mark.parametrize(("kept", "code"), [("ranks", 3), ("launcher", 1), ("finished", 0)])
def test_sigterm_reaches_the_ranks_and_their_code_the_job(tmp_path, kept, code):
    """As SLURM does 120 s before a job's end: SIGTERM to the job script alone. ``launcher``: one that hides the code of
    its ranks; ``finished``: the run ended by itself before it could be stopped."""
    (tmp_path / "rank.py").write_text(
        "import signal, sys, time, pathlib\n"
        "def stop(*_):\n"
        f"    time.sleep(1); pathlib.Path(sys.argv[1]).touch(); sys.exit({code})\n"
        "signal.signal(signal.SIGTERM, stop)\n"
        "pathlib.Path(sys.argv[2]).touch()\n"
        "time.sleep(60)\n"
    )
    saved, ready = tmp_path / "saved", tmp_path / "ready"
    folder = install(tmp_path)
    (folder / "python").write_text(f"#!/bin/sh\nexec {sys.executable} {tmp_path}/rank.py {saved} {ready}\n")
    (folder / "python").chmod(0o755)
    process, finished = start(folder, SINGLE, environment={"SRUN": "run"}, ntasks_per_node="2")
    while not ready.exists() and process.poll() is None:
        time.sleep(0.05)
    time.sleep(0.5)  # the second rank
    process.send_signal(signal.SIGTERM)
    job = finished()
    assert saved.exists() and job.code == code, job.said
    assert job.requeued == ([] if code == 0 else ["4711"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(1000)
def test_the_single_node_line_trains(tmp_path):
    """Two ranks on this machine, started by the job script itself."""
    if not knows_auto():
        pytest.skip("--resume_from_checkpoint auto is not there")
    out = tmp_path / "run"
    flags = ["--max_steps", "2", "--output_dir", str(out), *SHORT]
    environment = {"SRUN": "run", "SLURM_CPUS_PER_TASK": "1"}
    _, finished = start(install(tmp_path), SINGLE, *flags, environment=environment, ntasks_per_node="2")
    job = finished(timeout=900)  # DeepSpeed may have to be compiled
    assert job.code == 0, job.said[-3000:]
    steps = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == [1, 2] and "2 process(es)" in job.said
