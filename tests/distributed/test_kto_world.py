"""kto is a function of the global step: the same curve for one process and two, for large micro-batches and small."""

import json
import sys
from pathlib import Path

import pytest

from data_pipeline.generate import generate_pairs
from diffdpo.cli.flags import parse_config
from diffdpo.config import TrainConfig
from diffdpo.training.preference import train

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--nproc_per_node", "2", "launch/train.py"]
STEPS = 3


@pytest.fixture(scope="module")
def mixed_file(tmp_path_factory) -> Path:
    """Pairs, desirable answers and undesirable ones; 29 records, so the last step of an epoch has empty slots."""
    lines = []
    for i, record in enumerate(generate_pairs(29, seed=3)):
        if i % 3 == 0:
            lines.append(record)
            continue
        label = i % 3 == 1
        answer = record["chosen" if label else "rejected"]
        lines.append({"id": record["id"], "prompt": record["prompt"], "completion": answer, "label": label})
    path = tmp_path_factory.mktemp("mixed") / "mixed.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def flags(model: Path, data: Path, out: Path, micro: int, accumulation: int) -> list[str]:
    return [
        *("--model_name_or_path", str(model), "--train_data", str(data), "--output_dir", str(out)),
        *(
            "--loss_type",
            "kto",
            "--beta",
            "0.5",
            "--desirable_weight",
            "4",
            "--learning_rate",
            "5e-3",
            "--warmup_steps",
            "0",
        ),
        *("--max_steps", str(STEPS), "--num_mc_samples", "2", "--max_length", "64", "--max_prompt_length", "48"),
        *("--per_device_train_batch_size", str(micro), "--gradient_accumulation_steps", str(accumulation)),
        *("--eval_fraction", "0", "--tracking_uri", "none", "--segment_rows", "16"),
    ]


def curve(out: Path) -> list[tuple[float, float, float]]:
    """Loss, gradient norm and z of every step."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"], line["kl/reference_point"]) for line in lines if "loss" in line]


def here(model: Path, data: Path, out: Path, micro: int, accumulation: int) -> list[tuple[float, float, float]]:
    assert train(parse_config(TrainConfig, flags(model, data, out, micro, accumulation), "")).complete
    return curve(out)


@pytest.mark.distributed
def test_same_curve_however_a_step_is_cut(command, tiny_model, mixed_file, tmp_path):
    expected = here(tiny_model, mixed_file, tmp_path / "1x8", 8, 1)
    assert len(expected) == STEPS and expected[-1][0] < expected[0][0] - 0.01
    assert max(z for _, _, z in expected) > 0, "with z = 0 throughout the test could not see it"
    for micro, accumulation in ((4, 2), (2, 4)):
        found = here(tiny_model, mixed_file, tmp_path / f"{accumulation}x{micro}", micro, accumulation)
        assert found == [pytest.approx(step, rel=1e-4, abs=1e-5) for step in expected]
    out = tmp_path / "2 processes"
    done = command([*TORCHRUN, *flags(tiny_model, mixed_file, out, 2, 2)], timeout=240)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert curve(out) == [pytest.approx(step, rel=1e-4, abs=1e-5) for step in expected]
