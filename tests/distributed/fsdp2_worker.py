"""FSDP2 beside the plain engine, on the processes that torchrun started. ``fsdp2_worker.py TIED UNTIED FOLDER OUT``.

OUT gets a JSON object of findings, made by rank 0; each check is a function here, named as its finding.
"""

import json
import sys
from pathlib import Path

import torch

from diffdpo.engine.choice import fsdp2_choice
from diffdpo.engine.fsdp2 import Fsdp2Engine, Fsdp2Frozen
from diffdpo.engine.fsdp2_units import ShardedWeights, gathered, own_part
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World, init_distributed, shutdown_distributed
from diffdpo.errors import UserError
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.models.lora.adapters import add_lora
from diffdpo.sampling.decode import sample
from diffdpo.scores.masked_log_probs import MaskedLogProbs

# a large epsilon: where a gradient is all but 0, AdamW would make a step of its rounding
OPTIONS = OptimizerOptions(learning_rate=1e-2, weight_decay=0.1, epsilon=1e-4, max_grad_norm=0.05)


class ReadSizes(ShardedWeights):
    """Notes how many numbers of a tensor were read at a time, as a share of the tensor."""

    def __init__(self, *args):
        super().__init__(*args)
        self.shares: list[float] = []

    def fill(self, parameter, stored):
        sizes = self.shares

        class Noted:
            def __getitem__(self, rows):
                part = stored[rows]
                sizes.append(part.numel() / parameter.numel())
                return part

        super().fill(parameter, Noted())


def sharded(folder: str, world: World, **options) -> tuple[Fsdp2Engine, LoadedModel, ReadSizes]:
    choice = fsdp2_choice(processes=world.size, **options)
    shards = ReadSizes(choice, world)
    loaded = load_model(folder, shards=shards)
    module = MaskedLogProbs(loaded.model.requires_grad_(True), loaded.spec)
    return Fsdp2Engine(module, world, OPTIONS, choice=choice), loaded, shards


def plain(folder: str, world: World) -> tuple[PlainEngine, LoadedModel]:
    loaded = load_model(folder)
    module = MaskedLogProbs(loaded.model.requires_grad_(True), loaded.spec)
    return PlainEngine(module, world, OPTIONS), loaded


def rows(world: World, step: int) -> tuple[torch.Tensor, ...]:
    """Two rows of this rank, other ones at each step."""
    random = torch.Generator().manual_seed(100 * step + world.rank)
    ids = torch.randint(5, 300, (2, 12), generator=random)
    row, position = torch.tensor([0, 0, 1]), torch.tensor([3, 7, 11])
    return ids, torch.tensor([12, 12]), row, position, torch.randint(5, 300, (3,), generator=random)


def steps(engine, world: World, *numbers: int) -> list[float]:
    """Gradient norms; each step has two backwards."""
    norms = []
    for number in numbers:
        for last in (False, True):
            engine.backward(-engine(*rows(world, number)).sum() / 7, last=last)
        norms.append(engine.step(1e-2))
    return norms


def difference(engine: Fsdp2Engine, other) -> float:
    """Largest of any weight."""
    own = {name: gathered(p, engine.world.device) for name, p in engine.module.named_parameters()}
    found = dict(other.module.named_parameters())
    assert own.keys() == found.keys()
    return max(float((own[name] - gathered(found[name], engine.world.device)).abs().max()) for name in own)


def read_into_shards(folders, scratch, world):
    found = {}
    for folder in folders:
        engine, _, shards = sharded(folder, world)
        held = sum(own_part(p).numel() for p in engine.module.parameters())
        total = sum(p.numel() for p in engine.module.parameters())
        found[Path(folder).name] = [difference(engine, plain(folder, world)[0]), max(shards.shares), held / total]
    return found


def train_as_plain(folders, scratch, world):
    found = {}
    for folder in folders:
        for name, options in {"": {}, " offload": {"offload": True}, " copies": {"shard_size": 1}}.items():
            engine, other = sharded(folder, world, **options)[0], plain(folder, world)[0]
            norms = steps(engine, world, 1, 2, 3), steps(other, world, 1, 2, 3)
            apart = max(abs(a - b) / b for a, b in zip(*norms, strict=True))
            found[Path(folder).name + name] = [difference(engine, other), apart]
    return found


def sample_as_plain(folders, scratch, world):
    """Before any step, between steps and after a forward: the sampler calls parts of the model, not the module."""
    found = []
    for folder in folders:
        (engine, loaded, _), (other, its) = sharded(folder, world), plain(folder, world)
        for number in (1, 2):
            how = {"gen_length": 8, "steps": 8, "block_length": 4, "temperature": 1.0, "seed": 3}
            a, b = (sample(each.model, each.spec, [[5, 6, 7], [8, 9]], **how) for each in (loaded, its))
            found.append(a == b)
            steps(engine, world, number), steps(other, world, number)
        found.append(difference(engine, other) < 1e-6)
    return found


def kept_weights_are_not_stale(folders, scratch, world):
    engine, _, _ = sharded(folders[0], world, reshard_after_forward=False)
    other, _ = plain(folders[0], world)
    with torch.no_grad():
        engine(*rows(world, 9))
    steps(engine, world, 1), steps(other, world, 1)
    with torch.no_grad():
        return float((engine(*rows(world, 9)) - other(*rows(world, 9))).abs().max())


def resume(folders, scratch, world):
    """Saved and read again, by itself and by the plain engine, which it reads in turn."""
    found = {}
    for name, options in {"fsdp2": {}, "offload": {"offload": True}, "copies": {"shard_size": 1}}.items():
        engine, _, _ = sharded(folders[0], world, **options)
        steps(engine, world, 1, 2)
        folder = Path(scratch) / f"{name}-{world.size}"
        if world.is_main:
            folder.mkdir()
        world.barrier()
        engine.save(folder)
        world.barrier()
        again, other = sharded(folders[0], world, **options)[0], plain(folders[0], world)[0]
        again.load(folder), other.load(folder)
        steps(engine, world, 3), steps(again, world, 3), steps(other, world, 3)
        found[name] = [difference(engine, again), difference(engine, other)]
    mine, folder = plain(folders[0], world)[0], Path(scratch) / f"plain-{world.size}"
    steps(mine, world, 1, 2)
    if world.is_main:
        folder.mkdir()
    mine.save(folder)
    world.barrier()
    engine, _, _ = sharded(folders[0], world)
    engine.load(folder)
    steps(engine, world, 3), steps(mine, world, 3)
    found["from plain"] = [difference(engine, mine), 0.0]
    return found


def resume_elsewhere(folders, scratch, world):
    """What another number of processes saved, by the weights and the moments; and what another model saved."""
    other_size = {1: 2, 2: 1}[world.size]
    folder = Path(scratch) / f"fsdp2-{other_size}"
    if not folder.is_dir():
        return None
    engine, whole = sharded(folders[0], world)[0], plain(folders[0], world)[0]
    engine.load(folder), whole.load(folder)
    pairs = zip(engine.parameters, whole.parameters, strict=True)
    states = [(engine.optimizer.state[p]["exp_avg"], whole.optimizer.state[q]["exp_avg"]) for p, q in pairs]
    moments = [float((gathered(own, world.device) - other).abs().max()) for own, other in states]
    try:
        sharded(folders[1], world)[0].load(folder)
    except UserError as error:
        return [difference(engine, whole), max(moments), str(error)]


def a_frozen_module_is_let_go(folders, scratch, world):
    choice = fsdp2_choice(processes=world.size, bf16=True)
    loaded = load_model(folders[0], dtype="bfloat16", shards=ShardedWeights(choice, world))
    held = Fsdp2Frozen(MaskedLogProbs(loaded.model, loaded.spec), world, choice)
    with torch.no_grad():
        score, expected = (f(*rows(world, 1)) for f in (held, _in_bf16(folders[0])))
    held.release()
    return [float((score - expected).abs().max()), held.module is None]


def an_adapter_on_shards(folders, scratch, world):
    """Put on a model that was read into its shards: it starts and trains as on a whole one."""
    made = []
    for shards in (ShardedWeights(choice := fsdp2_choice(processes=world.size), world), None):
        loaded = load_model(folders[0], shards=shards)
        torch.manual_seed(0)
        module = MaskedLogProbs(add_lora(loaded.model, loaded.spec, r=2), loaded.spec)
        engine = Fsdp2Engine(module, world, OPTIONS, choice=choice) if shards else PlainEngine(module, world, OPTIONS)
        steps(engine, world, 1, 2)
        made.append(engine)
    return difference(*made)


def _in_bf16(folder: str) -> MaskedLogProbs:
    loaded = load_model(folder, dtype="bfloat16")
    return MaskedLogProbs(loaded.model, loaded.spec)


CHECKS = (read_into_shards, train_as_plain, sample_as_plain, kept_weights_are_not_stale, resume, resume_elsewhere)
CHECKS += (a_frozen_module_is_let_go, an_adapter_on_shards)


def main() -> None:
    tied, untied, scratch, out = sys.argv[1:5]
    world = init_distributed(always_distributed=True)
    found = {check.__name__: check((tied, untied), scratch, world) for check in CHECKS}
    if world.is_main:
        Path(out).write_text(json.dumps(found, indent=1))
    shutdown_distributed()


if __name__ == "__main__":
    main()
