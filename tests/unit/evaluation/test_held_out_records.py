"""Which held-out records count, and who meets whom, follow from the records alone: every figure, item by item."""

import json
from itertools import pairwise

import pytest
import torch

from data_pipeline.generate import generate_pairs
from diffdpo.config import TrainConfig
from diffdpo.engine.world import World
from diffdpo.scores import reference as references
from tests.support.held_out import figures, held_out_of

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
RECORDS = 13


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> tuple[str, str]:
    """(pairs, the same questions with single answers among them): lengths mixed, one answer given twice."""
    folder, pairs = tmp_path_factory.mktemp("held_out"), list(generate_pairs(RECORDS, seed=5))
    pairs[7] |= {"prompt": pairs[3]["prompt"]}  # two records of one prompt that disagree on the truth
    singles = []
    for i, record in enumerate(pairs):
        if i % 3 == 0:
            singles.append(record)
            continue
        answer = record["chosen" if i % 3 == 1 else "rejected"]
        singles.append({"id": record["id"], "prompt": record["prompt"], "completion": answer, "label": i % 3 == 1})
    for name, records in (("pairs", pairs), ("unpaired", singles)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return str(folder / "pairs.jsonl"), str(folder / "unpaired.jsonl")


def alike(found: dict, expected: dict) -> None:
    """The same figures, as many values in the same order, but for rounding."""
    assert found.keys() == expected.keys()
    for kind, values in expected.items():
        assert found[kind].keys() == values.keys(), kind
        for name, items in values.items():
            close = items if name in ("problems", "length", "exact_match") else pytest.approx(items, abs=2e-5)
            assert found[kind][name] == close, (kind, name)


@pytest.mark.parametrize(("limit", "batches"), [(0, (4, 16)), (5, (3, 16)), (8, (3,))])
def test_figures_do_not_depend_on_the_batch(tiny_model, files, limit, batches, tmp_path):
    def at(batch: int) -> dict:
        return figures(str(tiny_model), *files, batch=batch, limit=limit, world=WORLD, cache=tmp_path)

    expected = at(1)
    count = limit or RECORDS
    assert len(expected["pairs"]["loss"]) == len(expected["sft"]["loss"]) == count
    assert max(expected["kto"]["loss"]) - min(expected["kto"]["loss"]) > 1e-3, "a policy that is its reference hides it"
    for batch in batches:
        alike(at(batch), expected)


def test_a_larger_limit_adds_records_and_changes_none(tiny_model, files, tmp_path):
    """In pairs and supervised training, where a record's figure is its own."""
    at = [figures(str(tiny_model), *files, batch=4, limit=limit, world=WORLD, cache=tmp_path) for limit in (3, 6, 9, 0)]
    for less, more in pairwise(at):
        for kind, name in (("pairs", "loss"), ("pairs", "rewards/margins"), ("sft", "loss")):
            short, long = ({round(value, 3) for value in found[kind][name]} for found in (less, more))
            assert short < long


@pytest.mark.parametrize("loss", ["sigmoid", "kto"])
def test_a_second_evaluation_does_not_run_the_reference(tiny_model, files, loss, tmp_path, monkeypatch):
    scored, score_rows = [], references.score_rows

    def counted(*args, **options):
        scored.append(1)
        return score_rows(*args, **options)

    monkeypatch.setattr(references, "score_rows", counted)
    config = TrainConfig(
        model_name_or_path=str(tiny_model),
        loss_type=loss,
        num_mc_samples=2,
        max_length=64,
        max_prompt_length=48,
        per_device_eval_batch_size=4,
        num_eval_problems=0,
    )
    held_out, _ = held_out_of(config, files[0], WORLD, tmp_path)
    first, count = held_out.quick(), len(scored)
    assert count == 4 * (2 if loss == "kto" else 1), "four batches, and for kto their mismatched answers"
    assert held_out.quick() == first and len(scored) == count
