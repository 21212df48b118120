"""What the plan must say of memory whatever the figures: what grows, what does not, what moves where."""

import json
from dataclasses import replace

import pytest

from diffdpo.cards import GPUS
from diffdpo.config import TrainConfig
from diffdpo.errors import UserError
from diffdpo.planner.hardware import Host
from diffdpo.planner.job import planned_engine
from diffdpo.planner.memory import DEVICE, DISK, HOST
from diffdpo.planner.plan import Machine, Plan, make_plan
from tests.support.shapes import LLADA_8B

BASE = {"max_length": 64, "max_prompt_length": 32, "per_device_train_batch_size": 2}


def planned(path: str, ds: str | None = None, *, cuda: bool = True, world: int = 1, **settings) -> Plan:
    config = TrainConfig(model_name_or_path=path, ds_config=ds, **(BASE | settings))
    return make_plan(config, Machine(GPUS["RTX 4080"], Host(2**36), world), cuda=cuda)


def bytes_of(plan: Plan, name: str, place: str = DEVICE) -> int:
    return sum(part.bytes for part in plan.parts if part.name == name and part.place == place)


@pytest.fixture
def ds(tmp_path):
    def write(**zero) -> str:
        path = tmp_path / f"{len(list(tmp_path.iterdir()))}.json"
        path.write_text(json.dumps({"zero_optimization": zero}))
        return str(path)

    return write


@pytest.mark.parametrize("strategy", ["checkpoint", "two_pass"])
def test_segments_make_live_memory_independent_of_n(small, strategy):
    few, many = (
        planned(small, segmentation=strategy, segment_rows=4, num_mc_samples=n).run.policy.peak for n in (2, 64)
    )
    assert many <= 1.001 * few
    one_graph = [planned(small, segmentation="none", num_mc_samples=n).run.policy.peak for n in (2, 8)]
    assert one_graph[1] > 3 * one_graph[0]


def test_recomputing_layers_saves_and_costs(small):
    kept, recomputed = (planned(small, gradient_checkpointing=flag) for flag in (False, True))
    assert bytes_of(recomputed, "activations") < 0.6 * bytes_of(kept, "activations")
    ratio = sum(w.flops * n for w, n in recomputed.run.policy_work.items()) / sum(
        w.flops * n for w, n in kept.run.policy_work.items()
    )
    assert 1.2 < ratio < 4 / 3


def test_layers_inputs_on_the_host_are_those_of_the_rows_in_page_locked_pieces(small):
    """Three layers, 8 rows of 64 tokens of width 128 in fp32: 256 KiB a layer; 3 rows take the room of 4."""
    away = {"gradient_checkpointing": True, "activation_offload": "cpu", "segmentation": "two_pass"}
    name, row = "layers' inputs, page-locked", 3 * 64 * 128 * 4
    assert [bytes_of(planned(small, segment_rows=r, **away), name, HOST) // row for r in (8, 4, 3)] == [8, 4, 4]
    assert bytes_of(planned(small, segment_rows=8, cuda=False, **away), name, HOST) == 0


@pytest.mark.parametrize("how", [{"use_peft": True}, {"adapter_name_or_path": "a folder"}])
def test_an_adapter_that_goes_on_is_planned_on_weights_in_16_bits_as_it_is_trained(small, how):
    assert planned_engine(TrainConfig(model_name_or_path=small, **how), cuda=True, processes=1).bf16
    assert not planned_engine(TrainConfig(model_name_or_path=small), cuda=True, processes=1).bf16


def test_checkpoint_holds_a_full_gradient_that_two_pass_gives_away(small, ds):
    """In one backward every weight is used by every segment, so none of its gradient leaves before the end."""
    config = ds(stage=2, offload_optimizer={"device": "cpu"}, reduce_bucket_size=200_000)
    one, two = (
        planned(small, config, segmentation=name, segment_rows=1, num_mc_samples=2)
        for name in ("checkpoint", "two_pass")
    )
    assert bytes_of(one, "gradients") > 0.7 * one.numbers.trained_bytes
    assert bytes_of(two, "gradients") < 0.8 * bytes_of(one, "gradients")


def test_offload_moves_the_optimizer(small, ds):
    n = planned(small).numbers.trained
    near = planned(small, ds(stage=2), segment_rows=1)
    away = planned(small, ds(stage=2, offload_optimizer={"device": "cpu", "pin_memory": False}), segment_rows=1)
    assert bytes_of(near, "optimizer: moments") == bytes_of(away, "optimizer: moments", HOST) == 8 * n
    assert bytes_of(away, "optimizer: fp32 weights", HOST) == bytes_of(away, "gradients in fp32", HOST) == 4 * n
    disk = planned(
        small, ds(stage=3, offload_optimizer={"device": "nvme"}, offload_param={"device": "nvme"}), segment_rows=1
    )
    assert disk.need(DISK) == (2 + 2 + 16) * n  # weights, the reference's, optimizer and fp32 gradients


def test_pinned_memory_comes_in_powers_of_two(small, ds):
    zero = {"stage": 2, "offload_optimizer": {"device": "cpu", "pin_memory": True}}
    size = bytes_of(planned(small, ds(**zero), segment_rows=1), "gradients in fp32", HOST)
    assert size & (size - 1) == 0 and size >= 4 * planned(small).numbers.trained


def test_sharding_divides(small, ds):
    one, four = (planned(small, ds(stage=2), world=world, segment_rows=1) for world in (1, 4))
    assert bytes_of(four, "optimizer: moments") == bytes_of(one, "optimizer: moments") // 4
    assert bytes_of(four, "weights") == bytes_of(one, "weights")


def test_a_reference_costs_a_copy_or_nothing(small):
    copied = planned(small)
    assert bytes_of(copied, "reference copy") == copied.numbers.trained_bytes
    adapted = planned(small, use_peft=True)
    assert adapted.job.reference == "adapter_off" and not bytes_of(adapted, "reference copy")


def test_the_whole_vocabulary_is_never_held(write_config):
    """The head works in chunks of 256 MiB; the logits of a row of 1000 scored tokens would be 0.5 GiB in fp32."""
    path = write_config(LLADA_8B | {"n_layers": 2})
    plan = planned(path, use_peft=True, load_in_4bit=True, max_length=1024, max_prompt_length=24, segment_rows=1)
    assert plan.job.scored == 1000 and 0 < bytes_of(plan, "logits") < 2.1 * 256 * 2**20


def test_deferred_holds_two_more_gradients_and_runs_no_forward_twice(small):
    settings = {"segment_rows": 2, "num_mc_samples": 8, "use_peft": True}
    late, twice = (planned(small, segmentation=name, **settings) for name in ("deferred", "two_pass"))
    trained = late.numbers.trained_bytes
    assert bytes_of(late, "gradients") - bytes_of(twice, "gradients") <= 2.1 * trained
    flops = [sum(w.flops * n for w, n in p.run.policy_work.items()) for p in (late, twice)]
    assert flops[0] < 0.75 * flops[1]


def test_the_reference_is_the_run_s_own_choice(small, ds):
    """A second model of a fifth of the memory is too much, but not where four processes share it."""
    size = 2 * planned(small).numbers.total
    machine = Machine(replace(GPUS["RTX 4080"], memory=5 * size), Host(2**36), 4)
    found = [
        make_plan(TrainConfig(model_name_or_path=small, ds_config=ds(stage=stage), **BASE), machine).job.reference
        for stage in (2, 3)
    ]
    assert found == ["precomputed", "copy"]


def test_max_memory_is_planned_as_a_run_would_size_it(small):
    """Rows as many as fit in the share, and micro-batches of the same step that fit in one graph."""
    flags = {"num_mc_samples": 4, "gradient_accumulation_steps": 4, "max_length": 2048, "reference": "copy"}
    peaks = [planned(small, segmentation="two_pass", segment_rows=rows, **flags).need(DEVICE) for rows in (1, 16)]
    machine = Machine(replace(GPUS["RTX 4080"], memory=2 * peaks[1]), Host(2**36))

    def sized(share: float) -> Plan:
        settings = BASE | flags | {"max_memory": share}
        return make_plan(TrainConfig(model_name_or_path=small, **settings), machine, timed=False)

    found, config = sized(0.6), sized(0.6).job.config
    assert found.fit is not None and found.fit.fits and found.fit.budget == int(0.6 * machine.gpu.memory)
    assert found.fit.rows in (8, 16, 32) and found.need(DEVICE) <= found.fit.budget
    assert config.per_device_train_batch_size * config.gradient_accumulation_steps == 8
    assert found.job.strategy == "none" and found.job.rows == 8 * config.per_device_train_batch_size <= found.fit.rows
    assert not sized(peaks[0] / 3 / machine.gpu.memory).fit.fits
    with pytest.raises(UserError, match="--max_memory is a share of a GPU's memory; give --gpu"):
        make_plan(TrainConfig(model_name_or_path=small, max_memory=0.5), Machine(None, None))


def test_fsdp2_holds_a_share_of_everything(small):
    one, eight = (planned(small, engine="fsdp2", world=world, segment_rows=1) for world in (1, 8))
    n = one.numbers.trained
    assert bytes_of(one, "optimizer: moments") == 8 * n and bytes_of(eight, "optimizer: moments") == n
    assert bytes_of(eight, "weights") == 4 * n // 8  # fp32, whatever it computes in
    gathered = [bytes_of(plan, "weights gathered for use") for plan in (one, eight)]
    assert 0 < gathered[0] < gathered[1] < 2 * n
    kept = planned(small, engine="fsdp2", world=8, segment_rows=1, fsdp_reshard_after_forward=False)
    assert bytes_of(kept, "weights gathered for use") > 2 * n
    grouped = planned(small, engine="fsdp2", world=8, segment_rows=1, fsdp_shard_size=2)
    assert bytes_of(grouped, "weights") == 4 * n // 2


def test_fsdp2_offloads_to_the_host_and_keeps_an_adapter(small):
    away = planned(small, engine="fsdp2", world=2, segment_rows=1, fsdp_cpu_offload=True)
    n = away.numbers.trained
    assert bytes_of(away, "weights", HOST) == 2 * n and not bytes_of(away, "weights")
    assert bytes_of(away, "optimizer: moments", HOST) == 4 * n
    lora = planned(small, engine="fsdp2", world=2, segment_rows=1, fsdp_cpu_offload=True, use_peft=True)
    assert bytes_of(lora, "adapter") == 4 * lora.numbers.trained and bytes_of(lora, "weights", HOST)
    assert lora.job.whole_gradients


def test_fsdp2_reads_its_copy_of_the_reference_into_shards(small):
    plan = planned(small, engine="fsdp2", world=4, segment_rows=1, reference="copy")
    assert bytes_of(plan, "reference copy") == 2 * plan.numbers.trained // 4


def test_advice_for_fsdp2_stays_with_fsdp2(small):
    from diffdpo.cards import Gpu
    from diffdpo.planner.advise import advise

    config = TrainConfig(model_name_or_path=small, engine="fsdp2", bf16=True, **(BASE | {"max_length": 40}))
    plan = make_plan(config, Machine(GPUS["RTX 4080"], None, 1))
    needed = plan.need(DEVICE)
    tight = replace(GPUS["RTX 4080"], memory=needed - 4 * plan.numbers.trained)
    assert isinstance(tight, Gpu)
    advice = advise(replace(plan, machine=Machine(tight, None, 1)))
    assert advice is not None and "ds_config" not in advice.change
