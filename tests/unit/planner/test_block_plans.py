"""Plans of block-causal models: rows over clean tokens that a pair's segments share, and experts."""

import pytest

from diffdpo.config import TrainConfig
from diffdpo.planner.plan import Machine, make_plan

SDAR = {
    "model_type": "sdar", "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "vocab_size": 512, "rms_norm_eps": 1e-6, "rope_theta": 1e4, "tie_word_embeddings": False,
    "block_size": 4, "mask_token_id": 5, "eos_token_id": 6, "pad_token_id": 6,
}  # fmt: skip
MOE = {key: value for key, value in SDAR.items() if key != "block_size"} | {
    "model_type": "llada2_moe", "moe_intermediate_size": 16, "first_k_dense_replace": 1, "num_experts": 8,
    "num_experts_per_tok": 2, "num_shared_experts": 1, "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5,
    "partial_rotary_factor": 0.5, "head_dim": 16,
}  # fmt: skip
LENGTHS = {"max_length": 64, "max_prompt_length": 32, "per_device_train_batch_size": 1, "score_estimator": "balanced"}


def planned(write_config, shape=SDAR, **settings):
    config = TrainConfig(model_name_or_path=write_config(shape), **{"num_mc_samples": 4} | LENGTHS | settings)
    return make_plan(config, Machine(None, None))


def flops(plan) -> int:
    return sum(work.flops * times for work, times in plan.run.policy_work.items())


@pytest.mark.parametrize("strategy", ["two_pass", "checkpoint", "deferred"])
def test_what_more_rows_cost_is_the_rows_alone(write_config, strategy):
    """The clean tokens of a pair are run as often whatever n is, and the peak grows by the ids of the rows at most."""
    how = {"segmentation": strategy, "segment_rows": 2}
    plans = [planned(write_config, num_mc_samples=n, **how) for n in (4, 8, 12)]
    few, more, most = map(flops, plans)
    assert more < 2 * few and most - more == pytest.approx(more - few, rel=1e-6)
    assert plans[0].job.splits_pairs and plans[2].run.policy.peak <= 1.01 * plans[0].run.policy.peak


def test_layers_inputs_on_the_host_are_those_of_the_answers_rows_and_the_clean_tokens(write_config):
    """Rows begin with the answer's block, 32 tokens of 64; a pair's 88 clean tokens wait beside them."""
    how = {"segmentation": "two_pass", "segment_rows": 2, "gradient_checkpointing": True, "activation_offload": "cpu"}
    plan = planned(write_config, **how)
    assert plan.job.splits_pairs and plan.job.clean_tokens == 2 * 60 - 32
    found = next(part.bytes for part in plan.parts if part.name == "layers' inputs, page-locked")
    rows, clean = 2 * 32 * 64 * plan.job.width, 88 * 64 * plan.job.width
    assert found == 2 * (rows + 2 ** (clean - 1).bit_length())  # two layers; page-locked memory in powers of two


def test_auto_enumerates_small_blocks(write_config):
    plan = planned(write_config, score_estimator="auto", segment_rows=64)
    assert plan.job.rows == 30 and plan.job.strategy == "none" and not plan.job.splits_pairs
    assert (plan.job.start, plan.job.row_length, plan.job.clean_length) == (32, 32, 60)


def test_sharing_is_cheaper_than_full_attention(write_config):
    """Half of a row is its prompt, which is run once a pair: fewer operations than rows of full attention."""
    full = {key: value for key, value in SDAR.items() if key != "block_size"} | {"model_type": "a2d-qwen3"}
    how = {"segmentation": "two_pass", "segment_rows": 2, "num_mc_samples": 16}
    assert flops(planned(write_config, **how)) < 0.75 * flops(planned(write_config, full, block_size=0, **how))


@pytest.mark.parametrize("nf4", [False, True])
def test_experts(write_config, nf4):
    how = {"use_peft": True, "load_in_4bit": nf4, "segmentation": "two_pass", "segment_rows": 2, "lora_r": 8}
    plan = planned(write_config, MOE, **how)
    assert plan.job.block_size == 32 and plan.run.policy.peak > 0
    trained = planned(write_config, MOE, **how, lora_target_modules="gate_proj,up_proj,down_proj").numbers.trained
    assert trained > plan.numbers.trained  # also on experts


def test_blocks_that_are_not_declared(write_config):
    undeclared = {key: value for key, value in SDAR.items() if key != "block_size"} | {"model_type": "a2d-qwen3"}
    assert planned(write_config, undeclared, block_size=8).job.block_size == 8
    assert planned(write_config, undeclared, block_size=0).job.block_size is None
