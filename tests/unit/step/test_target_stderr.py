"""--target_stderr: n follows the standard error of the last step's rewards, and nothing else."""

import pytest
import torch

from data_pipeline.encode import Encoder
from data_pipeline.reader import PairLoader, open_dataset
from diffdpo.engine.base import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.losses.metrics import means
from diffdpo.models.load import load_model
from diffdpo.noise.options import NoiseOptions
from diffdpo.reference.scorers import copy_reference, frozen_copy
from diffdpo.scores.allocate import next_num_samples
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.step.segments import Segments
from diffdpo.step.train_step import LossOptions, PreferenceStep

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
BETA, TARGET, MOST = 0.5, 0.4, 12


@pytest.fixture(scope="module")
def loaded(tiny_model):
    return load_model(str(tiny_model))


@pytest.fixture(scope="module")
def batches(loaded, pairs_file, tmp_path_factory):
    dataset = open_dataset(str(pairs_file), cache_dir=tmp_path_factory.mktemp("cache"))
    encoder = Encoder(loaded.tokenizer, max_length=128, max_prompt_length=64)
    return list(PairLoader(dataset, encoder, seed=0, global_batch_size=4, micro_batch_size=4))


def make_step(tiny_model, target: float | None) -> PreferenceStep:
    loaded = load_model(str(tiny_model))
    module = MaskedLogProbs(loaded.model.requires_grad_(True), loaded.spec)
    frozen = frozen_copy(module)
    engine = PlainEngine(module, WORLD, OptimizerOptions(learning_rate=1e-3))
    return PreferenceStep(
        engine,
        copy_reference(engine, frozen, segments=Segments()),
        NoiseOptions("balanced", MOST, 0, loaded.spec.mask_token_id),
        LossOptions(("sigmoid",), (1.0,), beta=BETA),
        strategy="none",
        segments=Segments(),
        target_stderr=target,
    )


def test_n_is_what_the_last_step_asks_for(tiny_model, batches):
    step, expected, seen = make_step(tiny_model, TARGET), MOST, []
    for batch in batches[:10]:
        report = step([batch], 2e-3)
        assert report.num_samples == expected
        stderr = BETA * means(report.sums)["noise/ratio_stderr"]
        expected = next_num_samples(report.num_samples, stderr=stderr, target=TARGET, maximum=MOST)
        seen.append(report.num_samples)
    assert max(seen) == MOST and len(set(seen)) > 3, seen


def test_a_step_goes_on_from_its_state(tiny_model, batches):
    first, again = make_step(tiny_model, TARGET), make_step(tiny_model, TARGET)
    for batch in batches[:3]:
        first([batch], 0.0)
    assert first.state_dict() == {"num_samples": 2}  # policy = reference: no error, so 12, 6, 3, 2
    again.load_state_dict(first.state_dict())
    assert again([batches[3]], 0.0).num_samples == 2
    again.load_state_dict({"num_samples": 64})  # the maximum was larger then
    assert again.noise.num_samples == MOST


def test_without_a_target_n_stays(tiny_model, batches):
    step = make_step(tiny_model, None)
    step.load_state_dict({"num_samples": 2})
    assert [step([batch], 1e-3).num_samples for batch in batches[:3]] == [MOST] * 3
