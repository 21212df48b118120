"""Every file of ds_configs/: in the table of its README, accepted by DeepSpeed, and the same training as the others."""

import json
import re
import sys
from pathlib import Path

import pytest

from diffdpo.engine import preflight
from diffdpo.engine.ds_config import complete_ds_config, read_ds_config
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.errors import UserError
from diffdpo.models.architecture.from_scratch import new_model
from diffdpo.models.load import load_tokenizer, save_model
from tests.support.paths import ROOT

FOLDER = ROOT / "ds_configs"
FILES = sorted(FOLDER.glob("*.json"))
NAMES = [path.stem for path in FILES]
PROCESSES = 2


def test_there_is_a_file_for_every_way_to_shard():
    sharded = {"zero1", "zero2", "zero3", "zero3_offload", "zero3_nvme", "zeropp"}
    assert set(NAMES) == sharded | {"4080_offload", "4080_qlora", "4080_zero3_offload"}


def test_the_table_has_a_line_for_every_file():
    lines = re.findall(r"^\| `(.+)\.json` \|(.*)\|$", (FOLDER / "README.md").read_text(), re.MULTILINE)
    assert sorted(name for name, _ in lines) == sorted(NAMES)
    for name, told in lines:
        assert len(told.split("|")) == 3 and all(len(cell.split()) > 0 for cell in told.split("|")), name


@pytest.mark.parametrize("cuda", [False, True])
@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_deepspeed_accepts_it(path, cuda):
    options = OptimizerOptions(learning_rate=1e-3)
    place = {"micro_batch_size": 4, "accumulation_steps": 2, "world_size": 16, "bf16": cuda, "cuda": cuda}
    preflight.check_values(complete_ds_config(read_ds_config(path), options, **place))
    preflight.check_zeropp(read_ds_config(path), processes=16, cuda=True)


@pytest.mark.parametrize("path", FILES, ids=NAMES)
def test_it_holds_sharding_and_offload_only(path):
    """And for an adapter's optimizer that it is torch's, which stays on the card and takes nothing compiled."""
    content = json.loads(path.read_text())
    assert content.pop("optimizer", None) in (None, {"type": "AdamW", "params": {"torch_adam": True}})
    assert set(content) <= {"zero_optimization", "aio"}


@pytest.mark.parametrize("key", preflight.QUANTISED)
def test_quantisation_without_a_gpu_is_one_line(key):
    asked = {"zero_optimization": {"stage": 3, key: True}}
    with pytest.raises(UserError, match=f"{key}.*operators for GPUs only"):
        preflight.check_zeropp(asked, processes=8, cuda=False)
    preflight.check_zeropp(asked, processes=8, cuda=True)


def test_processes_that_make_no_whole_groups_are_one_line():
    asked = {"zero_optimization": {"stage": 3, "zero_hpz_partition_size": 8}}
    with pytest.raises(UserError, match="zero_hpz_partition_size to 8 and the run has 12"):
        preflight.check_zeropp(asked, processes=12, cuda=True)
    for processes in (1, 2, 8, 16):  # DeepSpeed makes a larger group as small as the run
        preflight.check_zeropp(asked, processes=processes, cuda=True)


def runnable(name: str, folder: Path) -> Path:
    """The file as this machine can run it: NVMe in a folder of the test, ZeRO++ without what needs a GPU."""
    content = json.loads((FOLDER / f"{name}.json").read_text())
    zero = content["zero_optimization"]
    if name == "zero3_nvme":
        (folder / "disk").mkdir()
        zero["offload_optimizer"]["nvme_path"] = str(folder / "disk")
    if name == "zeropp":
        zero |= dict.fromkeys(preflight.QUANTISED, False) | {"zero_hpz_partition_size": PROCESSES}
    if zero["stage"] == 3:
        zero["stage3_param_persistence_threshold"] = 0  # else a model this small is not sharded at all
    path = folder / f"{name}.json"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def found(command, tiny_model, tmp_path_factory) -> dict:
    """What the worker saw under every file that can run here."""
    folder = tmp_path_factory.mktemp("ds_configs")
    files = [str(runnable(name, folder)) for name in NAMES if name != "zero3_nvme" or preflight.libaio_found()]
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(PROCESSES)]
    line = [*torchrun, "tests/distributed/ds_config_worker.py", str(tiny_model), str(folder / "found"), *files]
    done = command(line, timeout=3000, PYTHONPATH=str(ROOT))  # operators are compiled at the first run on a machine
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return json.loads((folder / "found").read_text())


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(900)
def test_on_a_disk_for_real(command, tiny_model, tmp_path):
    """DeepSpeed leaves pieces below 1 MiB in memory, so a wider model: two processes with 4.9 million weights."""
    if not preflight.libaio_found():
        pytest.skip("libaio-dev is not installed")
    tokenizer = load_tokenizer(str(tiny_model))
    save_model(new_model(tokenizer, width=640, layers=1, heads=2, seed=0), tokenizer, tmp_path / "wide")
    torchrun = [str(Path(sys.executable).with_name("torchrun")), "--standalone", "--nproc_per_node", str(PROCESSES)]
    worker = ["tests/distributed/ds_config_worker.py", str(tmp_path / "wide"), str(tmp_path / "found")]
    done = command([*torchrun, *worker, str(runnable("zero3_nvme", tmp_path))], timeout=800, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    same_training(json.loads((tmp_path / "found").read_text()), "zero3_nvme")
    written = [path for path in (tmp_path / "disk").rglob("*.swp") if "exp_avg" in path.name]
    assert sum(path.stat().st_size for path in written) > 2 * 4 * 4e6  # two moments of most weights


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.timeout(3200)
@pytest.mark.parametrize("name", NAMES)
def test_three_steps_are_those_without_it(found, name):
    if name not in found:
        pytest.skip("libaio-dev is not installed")
    same_training(found, name)


def same_training(found: dict, name: str) -> None:
    """Losses and norms of three steps are those of the plain engine, with all weights trained and with LoRA."""
    for trained in ("", " LoRA"):
        ours, plain = found[name + trained], found["plain" + trained]
        assert len(ours) == len(plain) == 3
        for (loss, norm), (true_loss, true_norm) in zip(ours, plain, strict=True):
            assert loss == pytest.approx(true_loss, rel=1e-6, abs=1e-6)
            assert norm == pytest.approx(true_norm, rel=1e-4)
