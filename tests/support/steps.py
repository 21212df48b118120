"""A preference step on a tiny model, and the gradient it hands its optimizer."""

import torch

from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.losses.options import LossOptions
from diffdpo.models.load import load_model
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import copy_reference, frozen_copy
from diffdpo.scores.segments import Segments
from diffdpo.step.step import PreferenceStep

WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


def make_step(tiny_model, strategy: str, segment_rows: int, losses: str = "sigmoid", *, apart: bool = True):
    """A step whose policy is not its reference (``apart``), so that h is not 0."""
    loaded = load_model(str(tiny_model))
    module = MaskedLogProbs(loaded.model.requires_grad_(True), loaded.spec)
    frozen = frozen_copy(module)
    if apart:
        with torch.no_grad():
            for parameter in module.parameters():
                parameter += 0.02 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(4))
    engine = PlainEngine(module, WORLD, OptimizerOptions(learning_rate=1e-3))
    names = tuple(losses.split(","))
    return PreferenceStep(
        engine,
        copy_reference(engine, frozen, segments=Segments(rows=segment_rows)),
        NoiseOptions("mask_count", 3, 0, loaded.spec.mask_token_id),
        LossOptions(names, (1.0,) * len(names), beta=0.1),
        strategy=strategy,
        segments=Segments(rows=segment_rows),
    )


def gradient(step: PreferenceStep, micro_batches) -> tuple[torch.Tensor, float]:
    """Gradient of one step, caught before the optimizer uses it."""
    found = []
    step.engine.optimizer.step = lambda: found.append(
        torch.cat([p.grad.flatten().clone() for p in step.engine.parameters])
    )
    report = step(micro_batches, 0.0)
    return found[0], report.loss + (report.sft_loss or 0.0)
