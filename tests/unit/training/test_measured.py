"""Held-out results item by item, beside the run: named, whole at any time, and rewritten by a resume."""

import json

import pytest
import torch

from diffdpo.config import TrainConfig
from diffdpo.engine.world import World
from diffdpo.evaluation.samples import SampleFile, read_samples
from diffdpo.tracking.journal import Journal
from diffdpo.tracking.run import Tracking
from diffdpo.training.measured import Measured
from tests.support.held_out import held_out_of

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


@pytest.mark.parametrize("batch", [3, 16])
def test_items_are_named_in_the_order_of_their_values(tiny_model, pairs_file, tmp_path, batch):
    config = TrainConfig(
        model_name_or_path=str(tiny_model),
        num_mc_samples=2,
        max_length=64,
        max_prompt_length=48,
        num_eval_problems=3,
        per_device_eval_batch_size=batch,
        max_eval_pairs=10,
        eval_task="arithmetic",
    )
    held_out, _ = held_out_of(config, str(pairs_file), WORLD, tmp_path / "cache")
    measured = Measured(held_out, Tracking(tmp_path, Journal(tmp_path)), data="ab", resume_step=None)
    before = measured.evaluate("before")
    content = json.loads((tmp_path / "held_out.json").read_text())
    known = [json.loads(line)["id"] for line in pairs_file.read_text().splitlines()]
    assert content["data"] == "ab" and "after" not in content and len(content["exact_match"]) == 3
    assert content["records"] == sorted(content["records"], key=known.index) and len(content["records"]) == 10
    assert content["before"]["rewards/margins"] == pytest.approx(before.values["rewards/margins"], rel=1e-5)
    samples = read_samples(tmp_path)
    assert [(s["step"], s["when"]) for s in samples] == [(0, "before")] * 3
    assert [float(s["is_right"]) for s in samples] == before.values["exact_match"]


def test_a_resume_drops_answers_that_are_sampled_again(tmp_path):
    file = SampleFile(tmp_path, None)
    for step in (0, 4, 8):
        file.step = lambda step=step: step
        file.add("so far", [{"sampled": f"at {step}"}])
    with file.path.open("a") as torn:
        torn.write('{"step": 9, "sam')
    again = SampleFile(tmp_path, 4)
    assert [s["step"] for s in read_samples(tmp_path)] == [0, 4]
    again.step = lambda: 8
    again.add("after", [{"sampled": "anew"}])
    assert [s["sampled"] for s in read_samples(tmp_path)] == ["at 0", "at 4", "anew"]
