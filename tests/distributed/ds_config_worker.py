"""Three steps under each DeepSpeed JSON, and without one. ``ds_config_worker.py MODEL OUT FILE...``, by torchrun.

OUT gets (loss, gradient norm) of each step by the file's name, and "plain"; where a file cannot be used here, one line.
"""

import json
import sys
from pathlib import Path

import torch

from diffdpo.config import TrainConfig, make_config
from diffdpo.engine.choice import PLAIN, EngineChoice, choose_engine
from diffdpo.engine.make import check_host, make_engine
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.world import World, init_distributed, shutdown_distributed
from diffdpo.models.load import load_model
from diffdpo.models.lora.adapters import add_lora
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from tests.distributed.resume_worker import rows

STEPS, MICRO = 3, 4
FLAGS = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "learning_rate": 1e-3}
FLAGS |= {"adam_epsilon": 1e-4}  # an update of gradients near 0 follows the gradient, not rounding
OPTIONS = OptimizerOptions.of(make_config(TrainConfig, FLAGS))


def choice_of(path: Path | None, world: World) -> EngineChoice:
    """As a run with ``--ds_config`` would choose, checked against this host."""
    if path is None:
        return EngineChoice(PLAIN, world.size)
    config = make_config(TrainConfig, FLAGS | {"ds_config": str(path)})
    choice = choose_engine(config, processes=world.size, cuda=False, bf16_able=False)
    check_host(choice)
    return choice


def curve(folder: str, path: Path | None, world: World, *, lora: bool) -> list[tuple[float, float]]:
    torch.manual_seed(0)  # of the adapter
    loaded = load_model(folder)
    model = add_lora(loaded.model, loaded.spec, r=2, alpha=4) if lora else loaded.model.requires_grad_(True)
    module = MaskedLogProbs(model, loaded.spec)
    engine = make_engine(choice_of(path, world), module, world, OPTIONS, say=print)
    found = []
    for step in range(STEPS):
        total = torch.zeros(())
        for micro in range(MICRO):
            loss = -engine(*rows(step, MICRO * world.rank + micro)).sum() / (MICRO * world.size)
            total += loss.detach()
            engine.backward(loss, last=micro == MICRO - 1)
        norm = engine.step(OPTIONS.learning_rate)
        found.append((float(world.all_reduce_sum(total)), norm))
    return found


def main() -> None:
    folder, out, *paths = sys.argv[1:]
    world = init_distributed(always_distributed=True)
    found = {}
    for path in [None, *map(Path, paths)]:
        for lora in (False, True):
            name = ("plain" if path is None else path.stem) + (" LoRA" if lora else "")
            found[name] = curve(folder, path, world, lora=lora)
            if world.is_main:  # what was seen is kept, whatever comes after
                print(name, found[name], flush=True)
                Path(out).write_text(json.dumps(found))
    shutdown_distributed()


if __name__ == "__main__":
    main()
