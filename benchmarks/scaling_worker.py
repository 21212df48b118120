"""One process of `scaling.py`: steps of an engine, by phase, and what its collectives carry. Started by torchrun.

    torchrun --nproc_per_node 2 benchmarks/scaling_worker.py '{"engine": "fsdp2", "pairs": 4, ...}' OUT.json

Bytes are counted at torch's dispatcher in one step that is not timed, as a ring moves them: what one process sends.
"""

import json
import sys
import time
from collections import Counter
from pathlib import Path

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.engine.choice import PLAIN, EngineChoice, deepspeed_choice, fsdp2_choice
from diffdpo.engine.make import make_engine
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.world import World, init_distributed, shutdown_distributed
from diffdpo.losses.options import LossOptions
from diffdpo.models.load import load_model
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import no_reference
from diffdpo.scores.segments import Segments
from diffdpo.step.step import PreferenceStep

OPTIONS = OptimizerOptions(learning_rate=1e-4)
SENT = {  # of a collective over N processes, as a share of the bytes of its largest tensor
    "allreduce_": lambda n: 2 * (n - 1) / n,
    "_allgather_base_": lambda n: (n - 1) / n,
    "allgather_": lambda n: (n - 1) / n,
    "allgather_into_tensor_coalesced_": lambda n: (n - 1) / n,
    "_reduce_scatter_base_": lambda n: (n - 1) / n,
    "reduce_scatter_": lambda n: (n - 1) / n,
    "reduce_": lambda n: (n - 1) / n,
    "broadcast_": lambda n: (n - 1) / n,
}


class Collectives(TorchDispatchMode):
    """Bytes that this process sends, by kind of collective."""

    def __init__(self, size: int):
        super().__init__()
        self.size, self.bytes, self.calls = size, Counter[str](), Counter[str]()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            name = func.overloadpacket.__name__
            if name in SENT:
                tensors = [leaf for leaf in tree_leaves(args) if isinstance(leaf, torch.Tensor)]
                whole = max(tensor.nbytes for tensor in tensors)
                if name in ("allgather_", "reduce_scatter_"):  # lists of pieces
                    whole = self.size * min(tensor.nbytes for tensor in tensors)
                self.bytes[name] += round(whole * SENT[name](self.size))
            self.calls[name] += 1
        return func(*args, **(kwargs or {}))


def choice_of(kind: str, world: World, micro: int, accumulation: int) -> EngineChoice:
    """Of plain, fsdp2, zero2 and zero3."""
    if kind == "plain":
        return EngineChoice(PLAIN, world.size)
    if kind == "fsdp2":
        return fsdp2_choice(processes=world.size)
    stage = {"stage": int(kind.removeprefix("zero"))}
    if kind == "zero3":  # or so small a model is kept whole
        names = ("param_persistence_threshold", "max_live_parameters", "max_reuse_distance", "prefetch_bucket_size")
        stage |= {f"stage3_{name}": 0 for name in names}
    given = {"zero_optimization": stage, "optimizer": {"params": {"torch_adam": True}}}
    cut = {"micro_batch_size": micro, "accumulation_steps": accumulation, "processes": world.size}
    return deepspeed_choice(given, OPTIONS, **cut)


def batches_of(case: dict, world: World) -> list[PairBatch]:
    """Micro-batches of this rank: answers of ``tokens`` tokens (uneven: on the first rank a quarter)."""
    tokens = case["tokens"] // 4 if case["uneven"] and world.rank == 0 and world.size > 1 else case["tokens"]
    draws = torch.Generator().manual_seed(world.rank)

    def pair(number: int) -> TokenPair:
        sides = (torch.randint(4, 200, (tokens,), generator=draws).tolist() for _ in range(2))
        return TokenPair(f"{world.rank}-{number}", *(TokenAnswer(ids, tokens // 4) for ids in sides))

    count = case["pairs"] // case["micro"]
    return [
        collate(
            [pair(micro * case["micro"] + index) for index in range(case["micro"])],
            pad_id=0,
            epoch=0,
            step=0,
            micro=micro,
            last_micro=micro == count - 1,
        )
        for micro in range(count)
    ]


def main() -> None:
    case, out = json.loads(sys.argv[1]), Path(sys.argv[2])
    world = init_distributed(always_distributed=case["engine"].startswith("zero"))
    loaded = load_model(case["model"])
    module = MaskedLogProbs(loaded.model.requires_grad_(True), loaded.spec)
    choice = choice_of(case["engine"], world, case["micro"], case["pairs"] // case["micro"])
    engine = make_engine(choice, module, world, OPTIONS, say=print)
    meets = world if engine.retry_obstacle() is not None else None
    step = PreferenceStep(
        engine,
        no_reference,
        NoiseOptions("mask_count", 2, 0, loaded.spec.mask_token_id),
        LossOptions(("sigmoid",), (1.0,), beta=0.1),
        strategy="two_pass" if case["engine"] == "zero3" else "none",
        segments=Segments(rows=4, equal_over=meets),
        compared=False,
    )
    batches = batches_of(case, world)
    step(batches, 1e-4)
    counted = Collectives(world.size)
    with counted:
        step(batches, 1e-4)
    steps = []
    for _ in range(case["steps"]):
        world.barrier()
        world.clock.take()
        started = time.perf_counter()
        report = step(batches, 1e-4)
        steps.append({"step": time.perf_counter() - started, **world.clock.take()})
    own = {"steps": steps, "bytes": dict(counted.bytes), "calls": dict(counted.calls), "flops": report.flops}
    every = world.all_gather_object(own)
    if world.is_main:
        model = load_model(case["model"]).model
        found = {"weights": sum(p.numel() for p in model.parameters()), "tied": 0}
        if model.head.weight is model.embed.weight:
            found["tied"] = model.embed.weight.numel()
        out.write_text(json.dumps({"case": case, "size": world.size, **found, "ranks": every}))
    world.barrier()
    shutdown_distributed()


if __name__ == "__main__":
    main()
