"""Training state of every engine, read by every other, on the processes that torchrun started.

``resume_worker.py save|load MODEL FOLDER OUT``. "save": each engine takes two steps, writes itself into FOLDER/KIND and
takes two more. "load": each engine reads each of these folders and takes the two later steps. OUT gets, by "WRITER" or
"WRITER to READER", the losses of the later steps and the largest weights' difference from the writer's at the end.
"""

import json
import sys
from pathlib import Path

import torch

from diffdpo.engine.choice import deepspeed_choice, fsdp2_choice
from diffdpo.engine.deepspeed import DeepSpeedEngine
from diffdpo.engine.fsdp2 import Fsdp2Engine
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World, init_distributed, shutdown_distributed
from diffdpo.models.load import load_model
from diffdpo.scores.masked_log_probs import MaskedLogProbs

# a large epsilon: where a gradient is all but 0, AdamW would make a step of its rounding
OPTIONS = OptimizerOptions(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-4, max_grad_norm=0.05)
SMALL = {"stage3_param_persistence_threshold": 100, "sub_group_size": 5000}  # a weight lies in two groups; norms stay
HOST = {"offload_optimizer": {"device": "cpu"}}
KINDS: dict[str, dict] = {
    "plain": {},
    "fsdp2": {},
    "zero1": {"stage": 1},
    "zero2": {"stage": 2, "reduce_bucket_size": 10000},
    "zero2_offload": {"stage": 2, **HOST},
    "zero3": {"stage": 3, **SMALL},
    "zero3_offload": {"stage": 3, **SMALL, **HOST, "offload_param": {"device": "cpu"}},
}
ROWS = 6  # of a step, over all processes


def make(kind: str, folder: str, world: World):
    """The engine on the model as it was before training."""
    module = MaskedLogProbs(load_model(folder).model.requires_grad_(True), load_model(folder).spec)
    if kind == "plain":
        return PlainEngine(module, world, OPTIONS)
    if kind == "fsdp2":
        return Fsdp2Engine(module, world, OPTIONS, choice=fsdp2_choice(processes=world.size))
    sizes = {"micro_batch_size": 1, "accumulation_steps": ROWS // world.size, "processes": world.size}
    given = {"zero_optimization": KINDS[kind]}
    if "offload" not in kind:
        given["optimizer"] = {"type": "AdamW", "params": {"torch_adam": True}}  # nothing to compile
    return DeepSpeedEngine(module, world, OPTIONS, choice=deepspeed_choice(given, OPTIONS, **sizes))


def rows(step: int, number: int) -> tuple[torch.Tensor, ...]:
    random = torch.Generator().manual_seed(100 * step + number)
    ids = torch.randint(5, 300, (1, 12), generator=random)
    row, position = torch.tensor([0, 0]), torch.tensor([3, 7])
    return ids, torch.tensor([12]), row, position, torch.randint(5, 300, (2,), generator=random)


def steps(engine, *numbers: int) -> list[float]:
    """Losses of the steps, each the sum over ``ROWS`` rows."""
    losses, world = [], engine.world
    for number in numbers:
        own = range(world.rank, ROWS, world.size)
        total = torch.zeros(())
        for place in own:
            loss = -engine(*rows(number, place)).sum() / ROWS
            total += loss.detach()
            engine.backward(loss, last=place == own[-1])
        engine.step(1e-2)
        losses.append(float(world.all_reduce_sum(total)))
    return losses


def weights(engine) -> dict[str, torch.Tensor]:
    state = engine.full_state_dict()
    return {name: value.float().cpu().clone() for name, value in state.items()} if engine.world.is_main else {}


def save(model: str, folder: Path, world: World, kinds: list[str]) -> dict:
    found = {}
    for kind in kinds:
        engine = make(kind, model, world)
        steps(engine, 0, 1)
        if world.is_main:
            (folder / kind).mkdir()
        world.barrier()
        engine.save(folder / kind)
        world.barrier()
        found[kind] = steps(engine, 2, 3)
        if world.is_main:
            torch.save(weights(engine), folder / f"{kind}.pt")
        else:
            weights(engine)
    return found


def load(model: str, folder: Path, world: World, kinds: list[str]) -> dict:
    found = {}
    for kind in kinds:
        for writer in (path.name for path in sorted(folder.iterdir()) if path.is_dir()):
            engine = make(kind, model, world)
            engine.load(folder / writer)
            losses, ours = steps(engine, 2, 3), weights(engine)
            theirs = torch.load(folder / f"{writer}.pt")
            both = ours.keys() & theirs.keys()  # a tied head has two names under some engines
            assert len(both) >= len(ours) - 1
            apart = max((float((ours[n] - theirs[n]).abs().max()) for n in both), default=0.0)
            found[f"{writer} to {kind}"] = [losses, apart]
    return found


def main() -> None:
    what, model, folder, out, *kinds = sys.argv[1:]
    world = init_distributed(always_distributed=True)
    found = {"save": save, "load": load}[what](model, Path(folder), world, kinds or list(KINDS))
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    shutdown_distributed()


if __name__ == "__main__":
    main()
