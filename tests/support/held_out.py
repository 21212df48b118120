"""Every held-out figure of an untrained policy that is not its reference. Started by torchrun, or called in a test.

``held_out.py MODEL PAIRS UNPAIRED CASES OUT``: CASES is JSON, a list of (eval batch, limit); OUT gets, for each, every
figure's values, item by item, and the prompts of the problems.
"""

import json
import sys
from pathlib import Path

import torch

from data_pipeline.reader import open_dataset
from diffdpo.config import SftConfig, TrainConfig
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World, init_distributed, shutdown_distributed
from diffdpo.evaluation.heldout import HeldOutAnswers, HeldOutPairs
from diffdpo.evaluation.heldout_tasks import HeldOutTasks
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import load_model
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import copy_reference, frozen_copy
from diffdpo.scores.segments import Segments
from diffdpo.setup import data as run_data

LOSSES = {"pairs": "sigmoid", "aot": "aot", "unpaired": "apo_zero_unpaired", "kto": "kto"}


def figures(model: str, pairs: str, unpaired: str, *, batch: int, limit: int, world: World, cache: Path) -> dict:
    """Values of every figure by kind of evaluation; every rank calls and gets the same."""
    shared = {"num_mc_samples": 2, "max_length": 64, "max_prompt_length": 48, "num_eval_problems": 4}
    shared |= {"per_device_eval_batch_size": batch, "max_eval_pairs": limit, "eval_task": "arithmetic"}
    found = {}
    for kind, loss in LOSSES.items():
        config = TrainConfig(loss_type=loss, model_name_or_path=model, **shared)
        found[kind] = _values(config, pairs if kind in ("pairs", "aot") else unpaired, world, cache)
    found["sft"] = _values(SftConfig(model_name_or_path=model, **shared), pairs, world, cache)
    return found


def _values(config, data: str, world: World, cache: Path) -> dict:
    held_out, tasks = held_out_of(config, data, world, cache)
    asked = tasks.tasks["exact_match"].problems
    problems = [[problem.id, problem.truth, *problem.ids] for problem in asked]
    values = dict(held_out.evaluate("before").values)
    return values | {"problems": problems, "length": tasks.length if problems else 0}


def held_out_of(config, data: str, world: World, cache: Path):
    """What evaluates, with a policy apart from its reference, and its problems."""
    loaded = load_model(config.model_name_or_path)
    module = MaskedLogProbs(loaded.model.requires_grad_(True), loaded.spec)
    frozen = frozen_copy(module)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    engine = PlainEngine(module, world, OptimizerOptions(learning_rate=1e-3))
    encoder = make_encoder(config, loaded.tokenizer, loaded.spec)
    dataset = open_dataset(data, cache_dir=cache)
    batches = run_data.eval_batches(config, dataset, encoder, world)
    noise, segments = NoiseOptions.of(config, loaded.spec), Segments(rows=8)
    records = run_data.held_out_records(dataset, batches, world)
    tasks = HeldOutTasks(config, engine, loaded, encoder, records=records, batches=batches, segments=segments)
    if isinstance(config, SftConfig):
        return HeldOutAnswers(engine, noise, batches, tasks, segments=segments), tasks
    reference = copy_reference(engine, frozen, segments=segments)
    options = {"segments": segments, "max_length": config.max_length}
    return HeldOutPairs(engine, reference, noise, config.loss(), batches, tasks, **options), tasks


def main() -> None:
    model, pairs, unpaired, cases, out = sys.argv[1:6]
    world = init_distributed(always_distributed=True)
    cache = Path(out).parent / f"cache-{world.rank}"
    found = [
        figures(model, pairs, unpaired, batch=batch, limit=limit, world=world, cache=cache)
        for batch, limit in json.loads(cases)
    ]
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    shutdown_distributed()


if __name__ == "__main__":
    main()
