"""TR-DPO: a reference that follows the policy, also over a checkpoint."""

import pytest
import torch

import diffdpo
from data_pipeline.batch import collate
from data_pipeline.encode import Encoder
from data_pipeline.generate import generate_pairs
from data_pipeline.records import record_from_fields
from diffdpo.errors import UserError
from diffdpo.models.load import load_model
from diffdpo.reference.refresh import RefreshingStep
from diffdpo.scores.reference import frozen_copy
from tests.support.steps import make_step

ALPHA, EVERY, STEPS_PER_EPOCH = 0.6, 2, 3


def batches(tiny_model):
    """Two pairs a step, of steps 0, 1, 2 of epoch 0 and 0 of epoch 1."""
    loaded = load_model(str(tiny_model))
    encoder = Encoder(loaded.tokenizer, max_length=128, template="plain", terminator=loaded.spec.terminator_id)
    pairs = [encoder(record_from_fields(row)) for row in generate_pairs(2, seed=1)]
    for number in range(4):
        epoch, step = divmod(number, STEPS_PER_EPOCH)
        yield [collate(pairs, pad_id=0, epoch=epoch, step=step, micro=0, last_micro=True)]


def refreshing(tiny_model):
    step = make_step(tiny_model, "none", 64)
    moving = frozen_copy(step.engine.module)
    step.engine.beside["reference"] = moving
    return step, moving, RefreshingStep(step, moving, alpha=ALPHA, every=EVERY, steps_per_epoch=STEPS_PER_EPOCH)


def weights(module) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in module.parameters()])


def test_it_moves_as_trls_does_and_goes_on_after_a_checkpoint(tiny_model, tmp_path):
    step, moving, refresh = refreshing(tiny_model)
    start, found = weights(moving), []
    for number, micro_batches in enumerate(batches(tiny_model)):
        before = weights(moving)
        refresh(micro_batches, 1e-3)
        found.append(weights(moving))
        policy = weights(step.engine.module)
        if number % EVERY:  # steps 2 and 4
            assert torch.allclose(found[-1], ALPHA * policy + (1 - ALPHA) * before, atol=1e-7)
        else:
            assert torch.equal(found[-1], before)
        if number == 2:
            (tmp_path / "saved").mkdir()
            step.engine.save(tmp_path / "saved")
    assert not torch.equal(found[-1], start)
    again, other, refresh = refreshing(tiny_model)
    again.engine.load(tmp_path / "saved")
    assert torch.equal(weights(other), found[2])
    *_, last = batches(tiny_model)
    refresh(last, 1e-3)
    assert torch.equal(weights(other), found[3])


def test_a_reference_that_has_moved_is_not_set_back_by_a_resume(tiny_model, tmp_path):
    flags = {"num_generated_pairs": 8, "per_device_train_batch_size": 2, "num_mc_samples": 1, "max_eval_pairs": 2}
    flags |= {"num_eval_problems": 0, "save_steps": 1, "tracking_uri": "none", "output_dir": str(tmp_path / "run")}
    moving = {"sync_ref_model": True, "ref_model_sync_steps": 1}
    diffdpo.train(str(tiny_model), max_steps=2, **flags, **moving)
    with pytest.raises(UserError, match=r"its reference has followed the policy.* give --sync_ref_model"):
        diffdpo.train(str(tiny_model), max_steps=3, resume_from_checkpoint="latest", **flags)
