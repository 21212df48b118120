"""Gradients of one preference step under an engine, against one graph in one plain process. Started by torchrun.

``gradients.py MODEL PAIRS CASES OUT``: CASES is JSON, a list of settings (see ``Case``); OUT gets, for each strategy
and loss, the relative error of the gradient, and the calls of every rank. The gradient is read from Adam's first moment
(beta1 = 0), so it is the one the optimizer got: reduced, sharded and gathered again.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from data_pipeline.encode import Encoder
from data_pipeline.reader import PairLoader, open_dataset
from diffdpo.engine.choice import PLAIN, EngineChoice, deepspeed_choice, fsdp2_choice
from diffdpo.engine.deepspeed import DeepSpeedEngine
from diffdpo.engine.fsdp2 import Fsdp2Engine
from diffdpo.engine.fsdp2_units import gathered, own_part
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World, init_distributed, shutdown_distributed
from diffdpo.losses.options import LossOptions
from diffdpo.models.architecture.backbone import native
from diffdpo.models.architecture.router import train_routers, whole_with_routers
from diffdpo.models.load import load_model
from diffdpo.models.lora.adapters import add_lora
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import copy_reference, frozen_copy
from diffdpo.scores.segments import Segments
from diffdpo.step.step import PreferenceStep

MICRO, ACCUMULATION, TOTAL = 2, 2, 8  # pairs of a micro-batch, micro-batches, pairs of the step over all ranks
OPTIONS = OptimizerOptions(learning_rate=0.0, betas=(0.0, 0.95))


@dataclass(frozen=True)
class Case:
    """An engine (``ds``: zero_optimization; ``fsdp``: of ``fsdp2_choice``; neither: plain) with what runs under it."""

    name: str
    strategies: list[str]
    losses: list[str]
    ds: dict | None = None
    fsdp: dict | None = None
    lora: bool = False
    router: bool = False  # of a mixture of experts, trained too
    layers: bool = False  # checkpoint each layer as well,
    keeps: str = "nothing"  # and what of it is not computed again
    bf16: bool = False
    estimator: str = "mask_count"
    compiled: bool = False  # its blocks
    segment: int = 2  # rows
    rows_over: int = 1  # processes that hold a row's tokens together, of the plain engine
    greedy: bool = False  # on the last rank, backwards of more than 2 rows run out of memory from the third on


class Greedy(torch.autograd.Function):
    """The identity; its backward asks for more memory than any machine has."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad + torch.empty(2**60)[0]


def fail_late(module: MaskedLogProbs) -> None:
    """Break off inside the model's backward: gradients of the layers above are there, those of the layers below not."""
    block, seen = native(module.model).blocks[1], []
    forward = block.forward

    def greedy(x, rope, layout, *rest):
        if not torch.is_grad_enabled():
            return forward(x, rope, layout, *rest)
        rows = sum(bucket.rows for bucket in layout.buckets)
        seen.append(rows)
        return forward(Greedy.apply(x) if rows > 2 and len(seen) > 2 else x, rope, layout, *rest)

    block.forward = greedy


class Counted:
    """An engine that counts its calls."""

    def __init__(self, engine):
        self.engine, self.calls = engine, [0, 0]

    def __getattr__(self, name):
        return getattr(self.engine, name)

    def __call__(self, *inputs):
        self.calls[0] += 1
        return self.engine(*inputs)

    def backward(self, loss, *, last):
        self.calls[1] += 1
        self.engine.backward(loss, last=last)


def policy(folder: str, case: Case):
    """(module, spec): away from the reference, the same on every rank; weights that bf16 holds exactly where asked."""
    torch.manual_seed(0)  # of the adapter
    loaded = load_model(folder)
    if case.lora:
        whole = whole_with_routers(loaded.model, None) if case.router else None
        model = add_lora(loaded.model, loaded.spec, r=1, alpha=2, modules_to_save=whole)
    else:
        if case.router:
            train_routers(loaded.model)
        model = loaded.model.requires_grad_(True)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn(parameter.shape, generator=noise)
            if case.bf16:
                parameter.copy_(parameter.bfloat16())
    how = {"layer_checkpointing": case.layers, "keeps": case.keeps, "compile_blocks": case.compiled}
    return MaskedLogProbs(model, loaded.spec, **how), loaded


def step_of(engine, module, loaded, case: Case, strategy: str, loss: str) -> PreferenceStep:
    world = engine.world
    sharded = case.fsdp is not None or (case.ds or {}).get("stage", 0) >= 2
    # as a run does: ranks that can take a step again together need not cut alike
    meets = (sharded or case.rows_over > 1) and engine.retry_obstacle() is not None
    segments = Segments(
        rows=case.segment,
        equal_over=world if meets and world.size > 1 else None,
        turns=(world.rank % case.rows_over, case.rows_over) if world.size > 1 else (0, 1),
    )
    names = tuple(loss.split(","))
    smoothing = 1e-3 if "exo_pair" in names else 0.0
    return PreferenceStep(
        engine,
        copy_reference(engine, module, segments=segments),
        NoiseOptions(case.estimator, 5, 0, loaded.spec.mask_token_id, None, loaded.spec.block_size),
        LossOptions(names, (1.0,) * len(names), beta=0.1, parameters={"label_smoothing": smoothing}),
        strategy=strategy,
        segments=segments,
    )


def micro_batches(data, loaded, world: World) -> list:
    encoder = Encoder(loaded.tokenizer, max_length=128, max_prompt_length=64)
    accumulation = TOTAL // MICRO // world.size
    options = {"global_batch_size": TOTAL, "micro_batch_size": MICRO, "rank": world.rank, "world_size": world.size}
    loader = iter(PairLoader(data, encoder, seed=0, **options))
    return [next(loader) for _ in range(accumulation)]


def reference_of(folder: str) -> MaskedLogProbs:
    loaded = load_model(folder)
    return frozen_copy(MaskedLogProbs(loaded.model, loaded.spec))


def plain_gradient(folder: str, data, case: Case, strategy: str, loss: str, world: World) -> tuple[list, float]:
    module, loaded = policy(folder, case)
    engine = PlainEngine(module, world, OPTIONS)
    report = step_of(engine, reference_of(folder), loaded, case, strategy, loss)(
        micro_batches(data, loaded, world), 0.0
    )
    return [engine.optimizer.state[p]["exp_avg"] for p in engine.parameters], report.loss


def make_engine(module, case: Case, world: World):
    if case.fsdp is not None:
        choice = fsdp2_choice(processes=world.size, bf16=case.bf16, **case.fsdp)
        return Fsdp2Engine(module, world, OPTIONS, choice=choice)
    if case.ds is None:
        return PlainEngine(module, world, OPTIONS, choice=EngineChoice(PLAIN, world.size, row_processes=case.rows_over))
    config = {
        "zero_optimization": case.ds,
        "optimizer": {"params": {"torch_adam": True}},
        "zero_force_ds_cpu_optimizer": False,
    }
    choice = deepspeed_choice(
        config,
        OPTIONS,
        micro_batch_size=MICRO,
        accumulation_steps=ACCUMULATION,
        processes=world.size,
        bf16=case.bf16,
    )
    return DeepSpeedEngine(module, world, OPTIONS, choice=choice)


def gradients_of(engine) -> list[torch.Tensor]:
    """The gradient of the step just taken, whole, in fp32; every rank calls."""
    if isinstance(engine, PlainEngine):
        return [engine.optimizer.state[p]["exp_avg"] for p in engine.parameters]
    if isinstance(engine, Fsdp2Engine):
        return [gathered(engine.optimizer.state[p]["exp_avg"], engine.world.device) for p in engine.parameters]
    if not engine.choice.shards_parameters:
        # DeepSpeed 0.19.8 does not link the states of a second group to its parameters: read the flat partitions
        optimizer, found = engine.optimizer, {}
        for members, own in zip(optimizer.bit16_groups, optimizer.single_partition_of_fp32_groups, strict=True):
            flat = engine.world.all_gather(optimizer.optimizer.state[own]["exp_avg"])
            sizes = [p.numel() for p in members]
            pieces = flat[: sum(sizes)].split(sizes)
            found |= {id(p): piece.view_as(p) for p, piece in zip(members, pieces, strict=True)}
        return [found[id(p)] for p in engine.parameters]
    from deepspeed.utils import safe_get_full_optimizer_state

    return [safe_get_full_optimizer_state(p, "exp_avg") for p in engine.parameters]


def run(folder: str, data, case: Case, world: World, truth: dict) -> dict[str, dict]:
    found: dict[str, dict] = {}
    module, loaded = policy(folder, case)
    engine = Counted(make_engine(module, case, world))
    if case.greedy and world.rank == world.size - 1:
        fail_late(module)
    reference = reference_of(folder)
    if case.bf16:
        reference = reference.bfloat16()
    batches = micro_batches(data, loaded, world)
    for loss in case.losses:
        key = (case.lora, case.router, case.bf16, case.estimator, loss)
        if key not in truth:
            whole = "two_pass" if "aot" in loss or "kto" in loss else "none"
            alone = World(0, 0, 1, world.device)
            truth[key] = plain_gradient(folder, data, case, whole, loss, alone)
        expected, expected_loss = truth[key]
        for strategy in case.strategies:
            engine.calls = [0, 0]
            report = step_of(engine, reference, loaded, case, strategy, loss)(batches, 0.0)
            grads = gradients_of(engine.engine)
            difference = sum(float((g.cpu() - e).double().pow(2).sum()) for g, e in zip(grads, expected, strict=True))
            size = sum(float(e.double().pow(2).sum()) for e in expected)
            found[f"{case.name} {strategy} {loss}"] = {
                "error": (difference / size) ** 0.5,
                "loss": [report.loss, expected_loss],
                "balance": report.router_balance,
                "calls": world.all_gather_object(engine.calls),
                "sharded": _in_shards(engine),
                "repeated": bool(report.notes),
                "stage": engine.choice.sharding.stage,
                "cut": case.ds is not None or (engine.choice.sharding.over or world.size) > 1,
            }
    return found


def _in_shards(engine) -> bool:
    """Whether no process has all of the weights."""
    if not isinstance(engine.engine, Fsdp2Engine):
        return sum(p.numel() for p in engine.parameters) == 0
    held, whole = ([f(p) for p in engine.module.parameters()] for f in (lambda p: own_part(p).numel(), torch.numel))
    return sum(held) < sum(whole)


def main() -> None:
    folder, pairs, cases, out = sys.argv[1:5]
    world = init_distributed(always_distributed=True)
    results: dict[str, dict] = {}
    truth: dict = {}
    for settings in json.loads(cases):
        case = Case(**settings)
        data = open_dataset(pairs, cache_dir=Path(out).parent / f"cache-{world.rank}")
        results |= run(folder, data, case, world, truth)
        if world.is_main:
            print(
                f"{case.name}: {max(r['error'] for n, r in results.items() if n.startswith(case.name)):.1e}", flush=True
            )
    if world.is_main:
        Path(out).write_text(json.dumps(results, indent=1))
    shutdown_distributed()


if __name__ == "__main__":
    main()
