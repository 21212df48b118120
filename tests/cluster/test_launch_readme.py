"""launch/README.md: every line is one that its launcher and the project's flags take."""

import re
import shlex

import pytest

from tests.cluster.lines import train_config
from tests.cluster.slurm import directives
from tests.support.paths import ROOT

README = (ROOT / "launch/README.md").read_text()
LINES = [shlex.split(line, comments=True) for line in re.findall(r"^    (\S.*)$", README, re.MULTILINE)]
TRAINING = [line for line in LINES if "launch/train.py" in line]


def test_there_is_a_line_for_every_launcher():
    assert {line[0] for line in TRAINING} == {"python", "deepspeed", "torchrun", "accelerate"}
    assert {line[0] for line in LINES} >= {"sbatch", "kubectl"} and len(TRAINING) >= 6


@pytest.mark.parametrize("line", TRAINING, ids=" ".join)
def test_flags_and_files_exist(line, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = train_config(line)
    assert config.ds_config is None or (ROOT / config.ds_config).is_file()


@pytest.mark.parametrize("line", [line for line in TRAINING if line[0] == "torchrun"], ids=" ".join)
def test_torchrun_takes_it(line):
    from torch.distributed.run import get_args_parser

    assert get_args_parser().parse_args(line[1:]).training_script == "launch/train.py"


@pytest.mark.parametrize("line", [line for line in TRAINING if line[0] == "accelerate"], ids=" ".join)
def test_accelerate_takes_it(line, monkeypatch):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    monkeypatch.chdir(ROOT)
    parsed = launch_command_parser().parse_args(line[2:])
    assert parsed.training_script == "launch/train.py"
    kind = load_config_from_file(parsed.config_file).distributed_type.value
    assert kind == ("FSDP" if "fsdp2" in line else "DEEPSPEED")


@pytest.mark.parametrize("line", [line for line in TRAINING if line[0] == "deepspeed"], ids=" ".join)
def test_deepspeed_takes_it(line):
    from deepspeed.launcher.runner import parse_args

    assert parse_args(line[1:]).user_script == "launch/train.py"


def test_deepspeed_reads_the_example_of_a_hostfile():
    from deepspeed.launcher.runner import fetch_hostfile

    assert fetch_hostfile(str(ROOT / "launch/hostfile.example")) == {"worker-1": 8, "worker-2": 8}


@pytest.mark.parametrize("line", [line for line in LINES if line[0] == "sbatch"], ids=" ".join)
def test_job_scripts_and_recipes_exist(line, pairs_file, monkeypatch):
    monkeypatch.chdir(ROOT)
    script = next(n for n, word in enumerate(line) if word.endswith(".sbatch"))
    assert directives(ROOT / line[script])
    options = [word.removeprefix("--").partition("=")[0] for word in line[1:script]]
    assert set(options) <= set(directives(ROOT / line[script]))
    flags = line[script + 2 :] if "sweep" in line[script] else line[script + 1 :]
    if "--train_data" in flags:
        flags[flags.index("--train_data") + 1] = str(pairs_file)  # the user's
    assert train_config(["launch/train.py", *flags])


def test_every_file_that_is_named_exists():
    named = re.findall(r"\b((?:launch|docker|ds_configs|recipes)/[\w./]+\.\w+)", README)
    assert named and not [name for name in named if not (ROOT / name).exists()]
