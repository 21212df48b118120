"""Which strategy a run uses, and why: one line for the user. What cannot work is refused with the way that does."""

from dataclasses import dataclass, replace

from diffdpo.config import RunConfig, TrainConfig
from diffdpo.errors import UserError
from diffdpo.noise.block_score import resolved
from diffdpo.noise.estimators import MAX_EXACT_LENGTH, num_rows
from diffdpo.scores.segments import Segments


@dataclass(frozen=True)
class MicroBatchShape:
    """What is known of a micro-batch before any: ``rows_per_answer`` of up to ``max_length`` tokens, two answers each
    of ``pairs``; ``couples_pairs``: the loss couples the pairs of a global step; ``block_size``: of the family."""

    pairs: int
    rows_per_answer: int
    max_length: int
    couples_pairs: bool
    block_size: int | None = None

    @property
    def rows(self) -> int:
        """Rows of the micro-batch."""
        return 2 * self.pairs * self.rows_per_answer


def micro_batch_shape(config: RunConfig, *, couples_pairs: bool, block_size: int | None = None) -> MicroBatchShape:
    """That of the settings and the family, with as many rows as an answer can have."""
    estimator, _ = resolved(config.score_estimator, block_size)
    per_answer = num_rows(estimator, length=block_size or MAX_EXACT_LENGTH, num_samples=config.num_mc_samples)
    pairs = config.per_device_train_batch_size
    return MicroBatchShape(pairs, per_answer, config.max_length, couples_pairs, block_size)


def with_micro_batch(config: TrainConfig, pairs: int) -> TrainConfig:
    """This step in micro-batches of so many pairs, a divisor of its own."""
    own = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return replace(config, per_device_train_batch_size=pairs, gradient_accumulation_steps=own // pairs)


def check_segmentation(name: str, *, couples_pairs: bool) -> None:
    """UserError for a strategy that cannot serve the loss; what :func:`choose_strategy` would find out later."""
    if couples_pairs and name not in ("auto", "two_pass"):
        raise UserError(
            f"--segmentation {name}: this loss couples the pairs of a step, so their scores come first and the "
            "gradients after; use --segmentation two_pass or auto"
        )


def check_deferred(name: str, obstacle: str | None) -> None:
    """UserError for ``deferred`` where ``obstacle`` (``Engine.no_sync_obstacle``) stands against it."""
    if name == "deferred" and obstacle:
        raise UserError(f"--segmentation deferred: {obstacle}; use --segmentation two_pass or auto")


def choose_strategy(
    name: str,
    *,
    obstacle: str | None,
    reduces_in_backward: bool,
    segments: Segments,
    shape: MicroBatchShape,
    few: bool = False,
) -> tuple[str, str]:
    """(strategy, why) for ``--segmentation``. UserError for a strategy that this run cannot use.

    ``obstacle``: what stands against whole gradients until the end of a step (``Engine.no_sync_obstacle``);
    ``reduces_in_backward``: whether a backward moves gradients off the device (``EngineChoice``); ``few``: what is
    trained is small (LoRA), so that two more gradients of it are nothing.
    """
    check_segmentation(name, couples_pairs=shape.couples_pairs)
    if shape.couples_pairs:
        return "two_pass", "the loss couples the pairs of a step"
    check_deferred(name, obstacle)
    if name != "auto":
        return name, "as asked for"
    if segments.fit([shape.max_length] * shape.rows) == 1:
        return "none", f"all {shape.rows} rows of a micro-batch fit in one segment"
    full = segments.fit([shape.max_length] * shape.rows_per_answer) > 1
    if full and not obstacle:
        return "deferred", "the rows of one answer fill a segment, so no row needs a second forward"
    if few and not obstacle and segments.fit([shape.max_length] * 2 * shape.rows_per_answer) > 1:
        return "deferred", "the rows of one answer fill half a segment or more, so no row needs a second forward"
    if reduces_in_backward:
        return (
            "two_pass",
            "gradients leave the device after each segment; checkpoint would hold them to the end",
        )
    return "checkpoint", "gradients are reduced once a micro-batch"
