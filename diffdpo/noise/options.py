"""What the noise of a run depends on besides the record."""

from dataclasses import dataclass

import torch

from data_pipeline.batch import PairBatch
from diffdpo.errors import UserError
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.noise.block_score import check_block_estimator, resolved
from diffdpo.noise.estimators import SAMPLER_ORDER
from diffdpo.noise.last_block import with_whole_blocks
from diffdpo.noise.length import with_shorter_tails
from diffdpo.noise.rows import NoisyRows, noisy_rows
from diffdpo.settings.noise import NoiseSettings


@dataclass(frozen=True)
class NoiseOptions:
    """Which rows are drawn for an answer: a function of these, the epoch, the record and the side."""

    estimator: str
    num_samples: int
    seed: int
    mask_token_id: int
    num_diffusion_steps: int | None = None
    block_size: int | None = None  # of a block-causal family
    fill_with: int | None = None  # the terminator that fills an answer's last block; None: nothing does
    ld_alpha: float | None = None  # weight of the tokens that the longer answer of a pair has more (LD-DPO)

    @classmethod
    def of(cls, settings: NoiseSettings, spec: FamilySpec, *, ld_alpha: float | None = None) -> "NoiseOptions":
        """From the flags and the family; ``ld_alpha``: of the losses. UserError for an estimator that cannot serve."""
        estimator, _ = resolved(settings.score_estimator, spec.block_size)
        if spec.block_size:
            check_block_estimator(estimator, spec.block_size)
        elif settings.fill_last_block:
            raise UserError(f"--fill_last_block: {spec.name} has no blocks, its attention is full; leave it out")
        return cls(
            estimator,
            settings.num_mc_samples,
            settings.seed,
            spec.mask_token_id,
            settings.num_diffusion_steps,
            spec.block_size,
            spec.terminator_id if settings.fill_last_block else None,
            ld_alpha,
        )

    def describe(self, asked: str) -> str:
        """The estimator, why where `auto` chose it, and n."""
        because = f" ({resolved(asked, self.block_size)[1]})" if asked != self.estimator else ""
        if self.estimator == SAMPLER_ORDER:
            return f"{self.estimator}: likelihood token by token, the surest place first"
        return f"{self.estimator}{because}" + ("" if self.estimator == "exact" else f", n = {self.num_samples}")

    def as_scored(self, batch: PairBatch) -> PairBatch:
        """The batch with the answers that are scored: their last blocks filled where that was asked for."""
        if self.block_size and self.fill_with is not None:
            return with_whole_blocks(batch, block_size=self.block_size, terminator_id=self.fill_with)
        return batch

    def draw_rows(self, batch: PairBatch, device: torch.device, *, draw: int = 0) -> NoisyRows:
        """The noisy rows of a micro-batch; another ``draw``: others, independent of them."""
        batch = self.as_scored(batch)
        rows = noisy_rows(
            batch,
            estimator=self.estimator,
            num_samples=self.num_samples,
            seed=self.seed,
            mask_token_id=self.mask_token_id,
            num_diffusion_steps=self.num_diffusion_steps,
            draw=draw,
            block_size=self.block_size,
        )
        if self.ld_alpha is not None:
            rows = with_shorter_tails(rows, batch, alpha=self.ld_alpha, block_size=self.block_size)
        return rows.to(device)
