"""Models in use on a device that is not the host's: sampled, scored, evaluated, asked for pairs, merged. A forgotten
`.to(device)` ends the command; what it writes is what it writes on the host."""

import json
from pathlib import Path

import pytest
import torch

from diffdpo.models.load import load_model
from diffdpo.sampling.decode import sample
from tests.second_device import AWAY, second_device
from tests.support.block_reference import published

DEVICES = (str(AWAY), "cpu")


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with second_device():
        yield


@pytest.fixture
def pairs():
    """Short answers, which ``exact`` can enumerate."""
    lines = [{"id": str(a), "prompt": f"{a} + {a} =", "chosen": f" {2 * a}", "rejected": f" {a}"} for a in (1, 2, 3)]
    Path("pairs.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return lines


def lines_of(path: str | Path) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


SAMPLERS = {
    "block_cache": ("--block_cache", "--cfg_scale", "0.5"),
    "top_margin": ("--remasking", "top_margin"),
    "entropy": ("--remasking", "entropy", "--temperature", "0.5"),
    "threshold": ("--threshold", "0.5", "--temperature", "0.5", "--num_samples", "2"),
    "random": ("--remasking", "random", "--on_eos", "forbid"),
}


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_sampling_there(sampler):
    from diffdpo.cli.generate import main

    Path("prompts.txt").write_text("1 + 2 =\n12 + 4 - 2 =\n")
    asked = ["--prompts", "prompts.txt", "--gen_length", "8", "--block_length", "4", *SAMPLERS[sampler]]
    for device in DEVICES:
        main([*asked, "--device", device, "--output", f"{device}.jsonl"])
    found, wanted = (lines_of(f"{device}.jsonl") for device in DEVICES)
    assert found == wanted and len(found) in (2, 4)


@pytest.mark.parametrize("family", ["sdar", "Fast_dLLM_Qwen"])  # the second with shifted logits
def test_sampling_in_its_own_blocks_there(tmp_path, family):
    published(tmp_path / "model", family, 4)
    prompts, how = [[5, 6, 7], [8, 9, 10, 11], [3] * 9, [12]], {"gen_length": 14, "steps": 14, "temperature": 0.3}
    loaded = [load_model(tmp_path / "model", dtype="float64", device=device) for device in DEVICES]
    found, wanted = (sample(each.model, each.spec, prompts, **how) for each in loaded)
    assert found == wanted and any(found)


@pytest.mark.parametrize("estimator", ["balanced", "exact", "sampler_order"])
def test_scores_there(pairs, estimator, tiny_model):
    from diffdpo.cli.score import main

    asked = ["--pairs", "pairs.jsonl", "--score_estimator", estimator, "--num_mc_samples", "2", "--segment_rows", "3"]
    asked += ["--model_name_or_path", str(tiny_model), "--ref_model_name_or_path", str(tiny_model)]
    for device in DEVICES:
        main([*asked, "--device", device, "--dtype", "float32", "--output", f"{device}.jsonl"])
    main([*asked, "--device", DEVICES[0], "--dtype", "float32", "--output", f"{DEVICES[0]}.jsonl"])  # all is there
    found, wanted = (lines_of(f"{device}.jsonl") for device in DEVICES)
    assert [line["id"] for line in found if "id" in line] == [pair["id"] for pair in pairs]
    for there, at_home in zip(found, wanted, strict=True):
        for side in ("chosen", "rejected"):
            assert there[side] == pytest.approx(at_home[side], abs=1e-4)


def test_evaluating_there(pairs):
    from diffdpo.cli.evaluate import main

    of_pairs = ("pairs@pairs.jsonl", "perplexity@pairs.jsonl")
    asked = ["--task", *of_pairs, "multiple_choice", "arithmetic", "--segment_rows", "5"]
    asked += ["--num_generated", "3", "--limit", "3", "--num_mc_samples", "2", "--tracking_uri", "none"]
    for device in DEVICES:
        main([*asked, "--device", device, "--gen_length", "8", "--output", f"{device}.json"])
    found, wanted = (json.loads(Path(f"{device}.json").read_text())["results"] for device in DEVICES)
    assert len(found) == len(wanted) == 4
    for there, at_home in zip(found, wanted, strict=True):
        means = [{k: v["mean"] for k, v in each["figures"].items() if "mean" in v} for each in (there, at_home)]
        assert means[0] == pytest.approx(means[1], rel=1e-4, abs=1e-4) and means[0]


def test_its_own_answers_there():
    from diffdpo.cli.make_pairs import main

    asked = ["--num_prompts", "3", "--num_samples", "2", "--gen_length", "8", "--verifier", "none"]
    for device in DEVICES:
        main([*asked, "--device", device, "--output_dir", device])
    found, wanted = (lines_of(Path(device) / "answers.jsonl") for device in DEVICES)
    assert found == wanted and len(found) == 6


def test_merging_an_adapter_there(tiny_model):
    from diffdpo.models.lora.adapters import add_lora, merge

    merged = []
    for device in DEVICES:
        loaded = load_model(str(tiny_model), device=device)
        model = add_lora(loaded.model, loaded.spec, r=2)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if "lora" in name:
                    parameter.fill_(0.1)
        merged.append(merge(model).state_dict())
    there, at_home = merged
    assert {tensor.device for tensor in there.values()} == {AWAY}
    before = load_model(str(tiny_model)).model.state_dict()
    assert all(torch.allclose(there[name].cpu(), at_home[name], atol=1e-6) for name in at_home)
    assert any(not torch.equal(at_home[name], before[name]) for name in at_home)
