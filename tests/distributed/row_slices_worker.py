"""What two processes that share rows keep for a backward, and what they compute. ``row_slices_worker.py MODEL OUT``.

OUT gets bytes kept for the backward of one long row on one process and on each of two, the largest difference of log
probabilities and of gradients, with fewer key heads than processes too, and refusals.
"""

import json
import sys
from pathlib import Path

import torch

from diffdpo.engine.choice import PLAIN, EngineChoice
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.row_slices import slice_rows
from diffdpo.engine.world import World, init_distributed, shutdown_distributed
from diffdpo.errors import UserError
from diffdpo.models.architecture.from_scratch import new_model
from diffdpo.models.architecture.llada import LLaDAModelLM
from diffdpo.models.load import load_model, load_tokenizer
from diffdpo.scores.masked_log_probs import MaskedLogProbs

LENGTH = 400


def module_of(folder: str, **config) -> MaskedLogProbs:
    loaded = load_model(folder)
    torch.manual_seed(0)
    model = LLaDAModelLM(type(loaded.model.config)(**{**loaded.model.config.to_dict(), **config}))
    return MaskedLogProbs(model.requires_grad_(True), loaded.spec)


def inputs(length: int, every: int) -> tuple[torch.Tensor, ...]:
    ids = (torch.arange(length) % 300 + 5)[None]
    position = torch.arange(1, length, every)
    return ids, torch.tensor([length]), torch.zeros_like(position), position, ids[0, position]


def nothing() -> tuple[torch.Tensor, ...]:
    none = torch.zeros(0, dtype=torch.long)
    return torch.zeros(1, 1, dtype=torch.long), torch.tensor([1]), none, none, none


def kept_by(run) -> tuple[int, torch.Tensor]:
    """(bytes of different tensors that a graph holds on to, what ``run`` gives)."""
    seen = {}

    def pack(tensor):
        seen[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        found = run()
    return sum(seen.values()), found


def compare(folder: str, world: World, **config) -> dict:
    alone, shared = module_of(folder, **config), module_of(folder, **config)
    weights = sum(p.nbytes for p in alone.parameters())
    whole, logp = kept_by(lambda: alone(*inputs(LENGTH, 7)))
    logp.square().sum().backward()
    engine = PlainEngine(shared, world, OptimizerOptions(0.0), choice=EngineChoice(PLAIN, 2, row_processes=2))
    mine = inputs(LENGTH, 7) if world.is_main else nothing()
    share, ours = kept_by(lambda: engine(*mine))
    engine.backward(ours.square().sum(), last=True)
    gradients = [world.all_reduce_sum(p.grad) for p in shared.parameters()]
    apart = [float((a - b.grad).norm() / b.grad.norm()) for a, b in zip(gradients, alone.parameters(), strict=True)]
    return {
        "kept": [whole - weights, *(kept - weights for kept in world.all_gather_object(share))],
        "logp": float((ours - logp).abs().max()) if world.is_main else 0.0,
        "gradient": max(apart),
    }


def refusals(folder: str, world: World) -> list[str]:
    told, tokenizer = [], load_tokenizer(folder)
    engine = PlainEngine(
        module_of(folder), world, OptimizerOptions(0.0), choice=EngineChoice(PLAIN, 2, row_processes=2)
    )
    blocks = new_model(tokenizer, width=32, layers=1, heads=2, seed=0, block_size=4)
    odd = new_model(tokenizer, width=36, layers=1, heads=3, seed=0)
    spec = engine.module.spec
    for model, of in ((blocks, type(spec)(**{**vars(spec), "block_size": 4})), (odd, spec)):
        try:
            slice_rows(MaskedLogProbs(model, of), engine.slices)
        except UserError as error:
            told.append(str(error))
    return told


def main() -> None:
    folder, out = sys.argv[1:]
    world = init_distributed()
    found = {
        "as many key heads": compare(folder, world),
        "one key head": compare(folder, world, n_kv_heads=1, multi_query_attention=True),
        "refused": refusals(folder, world),
    }
    if world.is_main:
        Path(out).write_text(json.dumps(found))
    shutdown_distributed()


if __name__ == "__main__":
    main()
