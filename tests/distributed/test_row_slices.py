"""Rows over two processes: the numbers of one, in half of its memory; and the public command."""

import json
import sys
from pathlib import Path

import pytest

TORCHRUN = [str(Path(sys.executable).parent / "torchrun"), "--standalone", "--nproc_per_node", "2"]

pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.fixture(scope="module")
def found(command, tiny_model, tmp_path_factory) -> dict:
    out = tmp_path_factory.mktemp("slices") / "found.json"
    line = [*TORCHRUN, "tests/distributed/row_slices_worker.py", str(tiny_model), str(out)]
    done = command(line, timeout=600, PYTHONPATH=str(Path.cwd()))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return json.loads(out.read_text())


@pytest.mark.parametrize("heads", ["as many key heads", "one key head"])
def test_half_of_a_row_s_activations_and_the_same_numbers(found, heads):
    case = found[heads]
    assert case["logp"] < 1e-5 and case["gradient"] < 1e-5
    whole, *shares = case["kept"]
    assert all(0.4 * whole < share < 0.62 * whole for share in shares)


def test_models_that_cannot_are_refused(found):
    blocks, heads = found["refused"]
    assert "blocks" in blocks and "2 does not divide the 3 heads" in heads


@pytest.mark.slow
def test_a_run_is_that_with_whole_rows(command, tiny_model, pairs_file, tmp_path):
    """Same samples, noise, losses and held-out numbers; it goes on with whole rows."""
    curves = {}
    for name, flags in (("whole", []), ("slices", ["--sequence_parallel_size", "2", "--save_steps", "2"])):
        done = command(
            [
                *(
                    *TORCHRUN,
                    "launch/train.py",
                    "--model_name_or_path",
                    str(tiny_model),
                    "--train_data",
                    str(pairs_file),
                ),
                *("--output_dir", str(tmp_path / name), "--max_steps", "4", "--learning_rate", "1e-3"),
                *("--warmup_steps", "0", "--beta", "0.5", "--max_length", "128", "--max_prompt_length", "64"),
                *("--per_device_train_batch_size", "2", "--max_eval_pairs", "5", "--num_eval_problems", "2"),
                *("--tracking_uri", "none", "--segment_rows", "3", *flags),
            ],
            timeout=600,
        )
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        keys = ("loss", "grad_norm", "eval/loss", "rewards/margins", "records")
        curves[name] = [[line.get(key, 0) for key in keys] for line in lines]
    assert len(curves["whole"]) == len(curves["slices"]) > 4
    for ours, theirs in zip(curves["slices"], curves["whole"], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-5)
