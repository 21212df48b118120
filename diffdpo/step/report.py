"""What a step says of itself: its scores, folded to sums that add up over steps, reduced once over the ranks.

Shape suffixes: B pairs, 2 sides, R rows.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import cast

import torch

from data_pipeline.batch import PairBatch
from diffdpo.engine.base import Engine
from diffdpo.engine.world import World
from diffdpo.losses.metrics import pair_sums
from diffdpo.losses.options import LossOptions
from diffdpo.models.architecture.router import balance_loss, take_spread
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import fold
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rounding import size_of


@dataclass(frozen=True)
class MicroScores:
    """A micro-batch after scoring; all without a graph."""

    batch: PairBatch
    rows: NoisyRows
    reference_R: torch.Tensor
    policy_R: torch.Tensor
    loss: torch.Tensor


@dataclass(frozen=True)
class StepReport:
    """What a step says of itself, over all ranks. ``sums`` add up over steps; see ``losses.metrics``."""

    loss: float  # without the sft term: what is ln 2 at the start and comparable between runs; NaN without records
    sft_loss: float | None  # the sft term with its weight, where it stands beside another loss
    grad_norm: float
    sums: Mapping[str, float]
    tokens: int  # run through the policy, padding not counted
    records: int  # pairs (or single answers, for losses of those) the loss is the mean over; 0: nothing was learned
    largest_logit: float  # max |h| / β over pairs, nats
    relative_logit: float  # the same, of each pair's ``scores.rounding.size_of``
    num_samples: int = 0  # n of this step
    reference_point: float | None = None  # z of kto, nats
    computed_tokens: int = 0  # through the policy in all forwards of the step, padding included ...
    padding_tokens: int = 0  # ... and the padding among them
    flops: float = 0.0  # that the step cannot do without (``models.architecture.work``); 0: not counted
    segment_rows: int = 0  # size of a segment, where it is a number of rows,
    segment_tokens: int = 0  # or of tokens
    router_balance: float | None = None  # of trained routers, 1 where level (``models.architecture.router``)
    notes: tuple[str, ...] = ()  # what the user should be told


def report_of(
    scored: Sequence[MicroScores],
    *,
    engine: Engine,
    loss: LossOptions,
    compared: bool,
    grad_norm: float,
    records: int,
    reference_point: torch.Tensor | None,
    reference_forwards: int = 0,
) -> StepReport:
    """The report of a step from its scores; every rank calls, once a step."""
    own: dict[str, float] = {}
    for micro in scored:
        _add(own, _sums_of(micro, loss, compared=compared, records=records))
    computed, padding = _tokens_computed(engine)
    flops = _work(scored, engine, reference_forwards)
    whole = _summed(own | {"computed": computed, "padding": padding, "flops": flops}, engine.world)
    largest, relative = _largest_logits(scored, engine.world)
    total, supervised = whole.pop("loss"), whole.pop("supervised")
    return StepReport(
        loss=total - supervised if records else math.nan,
        sft_loss=supervised if loss.sft_weight else None,
        grad_norm=grad_norm,
        tokens=int(whole.pop("tokens")),
        computed_tokens=int(whole.pop("computed")),
        padding_tokens=int(whole.pop("padding")),
        flops=whole.pop("flops"),
        sums=whole,
        records=records,
        largest_logit=largest,
        relative_logit=relative,
        reference_point=None if reference_point is None else float(reference_point),
        router_balance=_router_balance(engine),
    )


def _largest_logits(scored: Sequence[MicroScores], world: World) -> tuple[float, float]:
    """(max |h| / β, max of it over the pair's size), over the pairs of all ranks; NaN where one is."""
    logits = [torch.zeros(2, 1, device=world.device)]
    for micro in scored:
        policy = fold(micro.policy_R, micro.rows)
        ratio_B2 = fold(micro.policy_R - micro.reference_R, micro.rows).score_B2
        logit_B = (ratio_B2[:, 0] - ratio_B2[:, 1]).abs()[micro.batch.pair_weight_B.to(ratio_B2.device) > 0]
        size_B = size_of(policy.score_B2, policy.tokens_B2)[micro.batch.pair_weight_B.to(ratio_B2.device) > 0]
        logits.append(torch.stack([logit_B, logit_B / size_B]))
    own = torch.cat(logits, 1).amax(1)  # not Python's max, which passes over NaN
    largest, relative = world.all_gather(own[None]).amax(0).tolist()
    return largest, relative


def _sums_of(micro: MicroScores, loss: LossOptions, *, compared: bool, records: int) -> dict[str, float]:
    """What a micro-batch adds to the step's sums."""
    policy, reference = fold(micro.policy_R, micro.rows), fold(micro.reference_R, micro.rows)
    weight_B2 = micro.batch.weight_B2.to(policy.score_B2.device)
    supervised = 0.0
    if loss.sft_weight:
        supervised = float(loss.sft_alone()(policy, reference, weight_B2).sum()) / max(1, records)
    return {
        **pair_sums(
            policy.score_B2,
            reference.score_B2 if compared else None,
            tokens_B2=policy.tokens_B2,
            weight_B2=weight_B2,
            beta=loss.beta,
            stderr_B2=policy.stderr_B2,
            ratio_stderr_B2=fold(micro.policy_R - micro.reference_R, micro.rows).stderr_B2,
        ),
        "loss": float(micro.loss),
        "supervised": supervised,
        "tokens": int(micro.rows.lengths_R.sum()),
    }


def _add(total: dict[str, float], more: Mapping[str, float]) -> None:
    for name, value in more.items():
        total[name] = total.get(name, 0.0) + value


def _summed(own: Mapping[str, float], world: World) -> dict[str, float]:
    """The sums over all ranks in one all-reduce; every rank has the same names in the same order."""
    values = torch.tensor(list(own.values()), dtype=torch.float64, device=world.device)
    return dict(zip(own, world.all_reduce_sum(values).tolist(), strict=True))


def _tokens_computed(engine: Engine) -> tuple[int, int]:
    """(tokens, padding among them) that this rank's policy has run since the last call."""
    counted = cast(MaskedLogProbs, engine.module).counted
    found = counted.computed, counted.padding
    counted.computed = counted.padding = 0
    return found


def _router_balance(engine: Engine) -> float | None:
    """The balance over all ranks' tokens since the last call; every rank has the same routers."""
    spread_L2E = take_spread(engine.module)
    return None if spread_L2E is None else balance_loss(engine.world.all_reduce_sum(spread_L2E.to(engine.world.device)))


def _work(scored: Sequence[MicroScores], engine: Engine, forwards: int) -> float:
    """FLOPs of this rank's rows; 0 for block-causal families, whose clean streams are not counted."""
    module = cast(MaskedLogProbs, engine.module)
    if module.spec.block_size:
        return 0.0
    return sum(module.work.of_rows(m.rows.lengths_R, len(m.rows.row_M), forwards=forwards) for m in scored)
