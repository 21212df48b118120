"""What ``--engine fsdp2`` comes to before there is a process: shards, words, refusals."""

import pytest

from diffdpo.config import TrainConfig, make_config
from diffdpo.engine.choice import EngineChoice, choose_engine, deepspeed_choice
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.errors import UserError


def chosen(processes: int = 8, *, bf16_able: bool = False, **flags) -> EngineChoice:
    config = make_config(TrainConfig, {"engine": "fsdp2", "learning_rate": 1e-3, **flags})
    return choose_engine(config, processes=processes, cuda=False, bf16_able=bf16_able)


def test_everything_is_cut_over_all_processes():
    choice = chosen()
    assert choice.sharding.stage == 3 and choice.sharding.over == 8 and choice.shards_parameters
    assert choice.describe() == "FSDP2" and not choice.checkpoint_is_per_rank


def test_flags_say_where_over_how_many_and_how_long():
    choice = chosen(fsdp_cpu_offload=True, fsdp_shard_size=4, fsdp_reshard_after_forward=False)
    assert (choice.sharding.parameters_on, choice.sharding.optimizer_on, choice.sharding.over) == ("cpu", "cpu", 4)
    words = choice.describe()
    assert "2 copies in 4 shards each" in words and "on cpu" in words and "kept" in words


def test_copies_must_be_equal():
    with pytest.raises(UserError, match="--fsdp_shard_size 3 does not divide the 8 processes"):
        chosen(fsdp_shard_size=3)


def test_trained_weights_are_read_in_fp32_and_frozen_ones_in_bf16():
    assert chosen(bf16_able=True).bf16 and not chosen(bf16_able=True, bf16=False).bf16
    half = chosen(bf16=True)
    assert not half.reads_bf16(trained=True) and half.reads_bf16(trained=False)


def test_gradients_wait_for_adapters_only():
    assert chosen().no_sync_obstacle(few=True) is None
    assert "undo the sharding of FSDP2" in (chosen().no_sync_obstacle(few=False) or "")


def test_one_process_can_take_a_step_again():
    assert chosen(1).retry_obstacle(None) is None
    assert "FSDP2 gathers weights inside forwards" in (chosen(2).retry_obstacle(None) or "")


def test_any_engine_reads_checkpoints_of_any_other_whatever_the_processes():
    plain = EngineChoice()
    sizes = {"micro_batch_size": 1, "accumulation_steps": 1}
    whole, zero, three = (
        deepspeed_choice({"zero_optimization": {"stage": stage}}, OptimizerOptions(1e-3), **sizes)
        for stage in (0, 2, 3)
    )
    for one in (plain, chosen(2), chosen(8, fsdp_shard_size=4)):
        assert all(one.reads(other.identity()) for other in (plain, chosen(1), chosen(4, fsdp_cpu_offload=True)))
        assert one.reads(zero.identity(), 3) and zero.reads(one.identity()) and whole.reads(one.identity())
        assert one.reads(zero.identity() | {"optimizer_on": "nvme"}) and not one.reads(whole.identity())
    assert zero.reads(zero.identity(), 1) and zero.reads(zero.identity(), 2) and three.reads(zero.identity(), 1)
    assert whole.reads(whole.identity(), 1) and not whole.reads(whole.identity(), 2)
    disk = {"stage": 3, "offload_optimizer": {"device": "nvme", "nvme_path": "/d"}}
    nvme = deepspeed_choice({"zero_optimization": disk}, OptimizerOptions(1e-3), **sizes)
    assert nvme.on_nvme and not three.on_nvme and not plain.on_nvme
    assert all(nvme.reads(one.identity(), 1) and one.reads(nvme.identity(), None) for one in (plain, three, nvme))


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"engine": "plain", "fsdp_cpu_offload": True}, "--fsdp_cpu_offload is about --engine fsdp2"),
        ({"fsdp_shard_size": 4}, "--fsdp_shard_size is about --engine fsdp2"),
        ({"engine": "fsdp2", "ds_config": "ds_configs/zero2.json"}, "--engine fsdp2 does not read --ds_config"),
        ({"engine": "fsdp2", "load_in_4bit": True, "use_peft": True}, "FSDP2 would cut the numbers alone"),
        ({"ds_config": "zero3", "load_in_4bit": True, "use_peft": True}, "ZeRO-3 would cut the numbers alone"),
        ({"ds_config": "zero3", "torch_compile": True}, "gains nothing under ZeRO-3"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(flags, told):
    with pytest.raises(UserError, match=told):
        make_config(TrainConfig, flags)


def test_the_plain_engine_has_bf16_for_frozen_weights_only():
    def plain(adapter, able=True, **flags):
        config = make_config(TrainConfig, flags)
        return choose_engine(config, processes=1, cuda=able, bf16_able=able, adapter=adapter)

    assert plain(True).reads_bf16(trained=False) and not plain(True).reads_bf16(trained=True)
    assert not plain(True, able=False).bf16 and not plain(False).bf16
    assert plain(True, able=False, bf16=True, use_peft=True).bf16
    with pytest.raises(UserError, match="--use_peft"):
        plain(False, bf16=True)
