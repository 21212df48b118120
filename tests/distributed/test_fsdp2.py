"""FSDP2 on one and two processes: what it reads, trains, samples and saves is what the plain engine does."""

import json
import sys
from pathlib import Path

import pytest

from data_pipeline.generate import generate_corpus

TORCHRUN = str(Path(sys.executable).parent / "torchrun")


@pytest.fixture(scope="module")
def untied_model(tmp_path_factory) -> Path:
    """As ``tiny_model``, with a head of its own and another width."""
    from diffdpo.models.architecture.from_scratch import new_model, train_tokenizer
    from diffdpo.models.architecture.llada import LLaDAModelLM
    from diffdpo.models.load import save_model

    texts = [record["prompt"] + record["completion"] for record in generate_corpus(500, seed=0)]
    tokenizer = train_tokenizer(texts, vocab_size=400)
    config = new_model(tokenizer, width=48, layers=2, heads=2, seed=0).config
    config.weight_tying = False
    folder = tmp_path_factory.mktemp("untied") / "untied_model"
    save_model(LLaDAModelLM(config), tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def found(command, tiny_model, untied_model, tmp_path_factory) -> dict[int, dict]:
    """What the worker saw on one process, then on two, which read what the one had saved."""
    scratch, seen = tmp_path_factory.mktemp("fsdp2"), {}
    for processes in (1, 2):
        out = scratch / f"found-{processes}.json"
        done = command(
            [
                *(TORCHRUN, "--standalone", "--nproc_per_node", str(processes), "tests/distributed/fsdp2_worker.py"),
                *(str(tiny_model), str(untied_model), str(scratch), str(out)),
            ],
            timeout=420,
            PYTHONPATH=str(Path.cwd()),
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
        seen[processes] = json.loads(out.read_text())
    return seen


pytestmark = [pytest.mark.distributed, pytest.mark.timeout(900)]


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_are_read_into_their_shards(found, processes):
    for difference, largest_read, held in found[processes]["read_into_shards"].values():
        assert difference == 0
        assert largest_read <= 1 / processes + 0.02 and held <= 1 / processes + 0.02


@pytest.mark.parametrize("processes", [1, 2])
def test_steps_are_those_of_the_plain_engine(found, processes):
    for name, (weights, norms) in found[processes]["train_as_plain"].items():
        assert weights < 2e-6 and norms < 1e-5, name


@pytest.mark.parametrize("processes", [1, 2])
def test_samples_are_those_of_the_plain_engine(found, processes):
    assert all(found[processes]["sample_as_plain"])


@pytest.mark.parametrize("processes", [1, 2])
def test_weights_kept_after_a_forward_are_not_used_after_a_step(found, processes):
    assert found[processes]["kept_weights_are_not_stale"] < 1e-4


@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_goes_on_from_its_own_files_and_those_of_the_plain_engine(found, processes):
    for name, (same, other) in found[processes]["resume"].items():
        assert other < 2e-6, name
        assert same == 0 or (name == "from plain" and same < 2e-6), name


def test_two_processes_read_what_one_has_saved(found):
    weights, moments, refusal = found[2]["resume_elsewhere"]
    assert weights == moments == 0
    assert "head" in refusal or "ff_out" in refusal or "shape" in refusal


@pytest.mark.parametrize("processes", [1, 2])
def test_a_frozen_module_scores_in_bf16_and_is_let_go(found, processes):
    difference, released = found[processes]["a_frozen_module_is_let_go"]
    assert difference == 0 and released


@pytest.mark.parametrize("processes", [1, 2])
def test_an_adapter_goes_on_a_model_in_shards(found, processes):
    assert found[processes]["an_adapter_on_shards"] < 2e-6
