"""What is refused before a model is loaded."""

import fcntl
from types import SimpleNamespace

import pytest
import torch

from diffdpo.engine import preflight
from diffdpo.engine.choice import deepspeed_choice
from diffdpo.engine.ds_config import complete_ds_config, read_ds_config
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from tests.support.paths import ROOT


def nvme(path, part="offload_optimizer"):
    return {"zero_optimization": {"stage": 3, part: {"device": "nvme", "nvme_path": path}}}


OPTIONS = OptimizerOptions(learning_rate=1e-3)
PLACE = {"micro_batch_size": 4, "accumulation_steps": 2, "world_size": 3, "bf16": False, "cuda": False}


def choice_of(zero, processes):
    given = {"zero_optimization": zero}
    return deepspeed_choice(given, OPTIONS, micro_batch_size=4, accumulation_steps=2, processes=processes)


@pytest.mark.parametrize("name", ["4080_offload", "4080_zero3_offload", "zero2", "zero3", "zero3_nvme"])
def test_deepspeed_accepts_the_shipped_configurations(name):
    given = read_ds_config(ROOT / "ds_configs" / f"{name}.json")
    preflight.check_values(complete_ds_config(given, OPTIONS, **PLACE))


@pytest.mark.parametrize(
    ("zero", "said"),
    [
        ({"offload_optimizer": {"device": "gpu"}}, r"offload_optimizer.device is 'gpu': .*'cpu'"),
        ({"reduce_bucket_size": "large"}, "reduce_bucket_size"),
        ({"ofload_optimizer": {"device": "cpu"}}, "ofload_optimizer"),
    ],
)
def test_what_deepspeed_does_not_accept_is_one_line(zero, said):
    config = complete_ds_config({"zero_optimization": {"stage": 2, **zero}}, OPTIONS, **PLACE)
    with pytest.raises(UserError, match=said) as caught:
        preflight.check_values(config)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("part", ["offload_optimizer", "offload_param"])
@pytest.mark.parametrize(
    ("path", "said"),
    [(None, "is missing"), ("/no/such/folder", "is not a folder"), (7, "is 7"), (__file__, "is not")],
)
def test_a_folder_for_nvme_must_be_there(path, said, part):
    with pytest.raises(UserError, match=f'"nvme_path" of {part} .*{said}.*; set it to'):
        preflight.check_nvme(nvme(path, part))


def test_a_folder_in_memory_is_no_disk(tmp_path, monkeypatch):
    mounts = [SimpleNamespace(mountpoint="/", fstype="ext4")]
    monkeypatch.setattr(preflight.psutil, "disk_partitions", lambda all: mounts)
    monkeypatch.setattr(preflight, "libaio_found", lambda: True)
    preflight.check_nvme(nvme(str(tmp_path)))
    mounts.append(SimpleNamespace(mountpoint=str(tmp_path), fstype="tmpfs"))
    with pytest.raises(UserError, match=r"lies in memory \(tmpfs\)"):
        preflight.check_nvme(nvme(str(tmp_path)))


def test_without_libaio_nothing_is_swapped(tmp_path, monkeypatch):
    monkeypatch.setattr(preflight.psutil, "disk_partitions", lambda all: [])
    monkeypatch.setattr(preflight, "libaio_found", lambda: False)
    with pytest.raises(UserError, match="install libaio-dev"):
        preflight.check_nvme(nvme(str(tmp_path)))


def test_nothing_is_asked_where_nothing_is_swapped():
    preflight.check_nvme({})
    preflight.check_nvme({"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}})


@pytest.mark.parametrize(
    ("zero", "processes", "few", "said"),
    [
        ({"stage": 0}, 1, True, "stage 0"),
        ({"stage": 1}, 2, False, None),
        ({"stage": 2}, 1, False, None),
        ({"stage": 2}, 2, False, "sharding of ZeRO-2"),
        ({"stage": 2}, 2, True, None),
        ({"stage": 2, "offload_optimizer": {"device": "cpu"}}, 1, False, "the offload"),
        ({"stage": 2, "offload_optimizer": {"device": "none"}}, 1, False, None),
        ({"stage": 3}, 1, False, "sharding of ZeRO-3"),
    ],
)
def test_whole_gradients_are_refused_where_they_undo_the_saving(zero, processes, few, said):
    found = choice_of(zero, processes).no_sync_obstacle(few=few)
    assert (found is None) if said is None else (said in found)


def test_gradients_leave_the_device_under_sharding_and_offload():
    assert not choice_of({"stage": 2}, 1).reduces_in_backward
    assert choice_of({"stage": 2}, 2).reduces_in_backward
    assert choice_of({"stage": 1, "offload_optimizer": {"device": "cpu"}}, 1).reduces_in_backward


def test_weights_on_nvme_are_refused_where_layers_are_computed_again(tmp_path):
    with pytest.raises(UserError, match=r"offload_param on NVMe.*leave out --gradient_checkpointing"):
        preflight.check_recomputed(nvme(str(tmp_path), "offload_param"))
    preflight.check_recomputed(nvme(str(tmp_path), "offload_optimizer"))
    preflight.check_recomputed({"zero_optimization": {"stage": 3, "offload_param": {"device": "cpu"}}})
    preflight.check_recomputed({})


@pytest.mark.parametrize(("parts", "takes"), [((), None), (("offload_optimizer",), 160), (("offload_param",), 80)])
def test_a_disk_without_room_is_told_before_it_is_full(parts, takes, tmp_path, monkeypatch):
    """10 parameters are trained and 10 are not; what an earlier run left there counts as room."""
    (tmp_path / "zero_stage_3").mkdir()
    (tmp_path / "zero_stage_3" / "left.swp").write_bytes(b"0" * 20)
    (tmp_path / "of somebody else").write_bytes(b"0" * 1000)
    module = torch.nn.Sequential(torch.nn.Linear(5, 2, bias=False), torch.nn.Linear(5, 2, bias=False))
    module[1].requires_grad_(False)
    zero = {"stage": 3} | {part: {"device": "nvme", "nvme_path": str(tmp_path)} for part in parts}
    world = World(0, 0, 1, torch.device("cpu"))
    for room in (takes or 0, (takes or 1) - 1):
        monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _, room=room: SimpleNamespace(free=room - 20))
        if takes is None or room >= takes:
            preflight.check_nvme_room({"zero_optimization": zero}, module, world)
        else:
            with pytest.raises(UserError, match=f"nvme_path.*{tmp_path} with 0.0 GB of room"):
                preflight.check_nvme_room({"zero_optimization": zero}, module, world)


def test_two_folders_of_one_disk_share_its_room(tmp_path, monkeypatch):
    zero: dict = {"stage": 3}
    for part in ("offload_optimizer", "offload_param"):
        (tmp_path / part).mkdir()
        zero[part] = {"device": "nvme", "nvme_path": str(tmp_path / part)}
    module, world = torch.nn.Linear(5, 2, bias=False), World(0, 0, 1, torch.device("cpu"))
    monkeypatch.setattr(preflight.shutil, "disk_usage", lambda _: SimpleNamespace(free=199))
    with pytest.raises(UserError, match=r"offload_optimizer and .*offload_param with 0.0 GB"):  # 160 and 40 bytes
        preflight.check_nvme_room({"zero_optimization": zero}, module, world)
    preflight.check_nvme_room({"zero_optimization": zero}, module, world, trains=False)


def test_a_folder_is_held_once_by_a_process_however_it_is_written(tmp_path):
    place, world = {"device": "nvme", "nvme_path": str(tmp_path)}, World(0, 0, 1, torch.device("cpu"))
    both = {"stage": 3, "offload_optimizer": place, "offload_param": place | {"nvme_path": f"{tmp_path}/."}}
    first = preflight.hold_nvme({"zero_optimization": both}, world)
    again = preflight.hold_nvme({"zero_optimization": {"stage": 3, "offload_param": place}}, world)
    assert first == again and len(first) == 1 and preflight.hold_nvme({}, world) == []
    assert preflight.hold_nvme({"zero_optimization": both}, World(1, 1, 1, torch.device("cpu"))) == []
    with (tmp_path / preflight.NVME_LOCK).open("a") as other, pytest.raises(BlockingIOError):
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    first.clear()
    again.clear()
    with (tmp_path / preflight.NVME_LOCK).open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)  # of another run, from here on
        with pytest.raises(UserError, match="where another run keeps its state"):
            preflight.hold_nvme({"zero_optimization": both}, world)
