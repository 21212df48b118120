"""What one process of a run would do, as far as memory and time depend on it: settings resolved by the run's rules."""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

from diffdpo.config import TrainConfig, resolve
from diffdpo.engine.base import trains_few
from diffdpo.engine.choice import FSDP2, EngineChoice, choose_engine
from diffdpo.engine.sharding import Sharding
from diffdpo.reference.modes import check_reference, choose_mode
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.segments import make_segments
from diffdpo.step.strategy import choose_strategy, micro_batch_shape


@dataclass(frozen=True)
class PlannedRun:
    """One process's share of a run."""

    config: TrainConfig
    choice: EngineChoice
    cuda: bool
    rows_per_answer: int
    segment_rows: int  # of the longest rows, as many as a segment takes
    strategy: str
    why: str
    whole_gradients: bool  # whether ``deferred`` could be used
    reference: str
    length: int  # tokens of prompt and answer
    scored: int  # positions scored in a row
    block_size: int | None = None  # of a block-causal family
    shares_clean: bool = False  # whether the segments of a pair share its clean tokens (`scores.shared_clean`)
    segment_tokens: int = 0  # of a segment cut by tokens; 0: by rows

    @property
    def sharding(self) -> Sharding:
        """What the engine cuts over the processes, and where it lives."""
        return self.choice.sharding

    @property
    def bf16(self) -> bool:
        """Whether weights are in 16 bits."""
        return self.choice.bf16

    @property
    def world(self) -> int:
        """Processes."""
        return self.choice.processes

    @property
    def shards(self) -> int:
        """Processes that share one copy of what is cut."""
        return self.sharding.over or self.world

    @property
    def adapter_is_whole(self) -> bool:
        """Whether what is trained is on every process, beside frozen weights in shards."""
        return self.choice.kind == FSDP2 and self.config.adapts

    @property
    def pairs(self) -> int:
        """Pairs of a micro-batch."""
        return self.config.per_device_train_batch_size

    @property
    def rows(self) -> int:
        """Rows of a micro-batch."""
        return 2 * self.pairs * self.rows_per_answer

    @property
    def start(self) -> int:
        """Where a row begins: of a block-causal family with the block that the answer begins in."""
        return (self.length - self.scored) // self.block_size * self.block_size if self.block_size else 0

    @property
    def row_length(self) -> int:
        """Tokens of a row."""
        return self.length - self.start

    @property
    def clean_length(self) -> int:
        """Clean tokens that the rows of an answer look back on."""
        return (self.length - 1) // self.block_size * self.block_size if self.block_size else 0

    @property
    def pair_rows(self) -> int:
        """Rows of both answers of a pair."""
        return 2 * self.rows_per_answer

    @property
    def pairs_in_segment(self) -> int:
        """Pairs that one segment holds with their clean tokens; 0 where a pair takes several."""
        if not self.segment_tokens:
            return self.segment_rows // self.pair_rows
        return self.segment_tokens // (self.clean_tokens + self.pair_rows * self.row_length)

    @property
    def splits_pairs(self) -> bool:
        """Whether the segments of a pair share its clean tokens, run before them."""
        whole = self.strategy == "none" or (self.strategy != "deferred" and self.pairs_in_segment)
        return self.shares_clean and not whole

    @property
    def rows_at_once(self) -> int:
        """Rows of the largest forward with a graph."""
        if self.strategy == "none":
            return self.rows
        if self.strategy == "deferred":
            return min(self.rows_per_answer, self.segment_rows)
        if self.shares_clean:
            return min(self.rows, self.pairs_in_segment * self.pair_rows or min(self.pair_rows, self.segment_rows))
        return min(self.rows, self.segment_rows)

    @property
    def clean_tokens(self) -> int:
        """Clean tokens of a pair, of a block-causal family."""
        return 2 * self.clean_length - self.start

    @property
    def tokens_at_once(self) -> tuple[int, ...]:
        """Tokens of the calls whose graphs stand at once at most: the largest forward, and a pair's clean tokens."""
        rows = self.rows_at_once * self.row_length
        if self.splits_pairs:
            return rows, self.clean_tokens
        return (rows + max(1, self.rows_at_once // self.pair_rows) * self.clean_tokens,)

    @property
    def segments(self) -> int:
        """Forwards with a graph in a micro-batch; that of shared clean tokens is none of them."""
        if self.strategy == "deferred":
            return 2 * self.pairs * -(-self.rows_per_answer // self.rows_at_once)
        if self.splits_pairs:
            return self.pairs * -(-self.pair_rows // self.rows_at_once)
        return -(-self.rows // self.rows_at_once)

    @property
    def backwards(self) -> int:
        """Backwards of an optimizer step after which an engine reduces gradients."""
        per_micro = self.segments if self.strategy == "two_pass" else 1
        return per_micro * self.config.gradient_accumulation_steps

    @property
    def reference_rows(self) -> int:
        """Rows of a forward of the reference."""
        whole = self.pairs_in_segment * self.pair_rows if self.shares_clean else 0
        return min(self.rows, whole or self.segment_rows)

    @property
    def width(self) -> int:
        """Bytes of a weight."""
        return 2 if self.bf16 else 4


def plan_run(
    config: TrainConfig,
    module: MaskedLogProbs,
    choice: EngineChoice,
    *,
    cuda: bool,
    second_model: Callable[[], float],
    scored: int | None = None,
    block_size: int | None = None,
) -> PlannedRun:
    """Settings → what a process would do. ``module``: what would be trained, on the meta device. ``second_model()``:
    the part of the memory that a copy of it would take, for ``--reference auto``. ``scored``: scored positions of a
    row; default: all of the longest answer. ``block_size``: of a block-causal family."""
    few = trains_few(module)
    obstacle = choice.no_sync_obstacle(few=few)
    loss = config.loss()
    check_reference(config, loss)
    in_shards = choice.meets_in_forwards or choice.sharding.gradients  # as `make_segments` decides for a run
    meets = choice.processes > 1 and in_shards and choice.retry_obstacle(obstacle) is not None
    segments = make_segments(config, choice, torch.device("cuda" if cuda else "cpu"))
    shape = micro_batch_shape(config, couples_pairs=loss.couples_pairs, block_size=block_size)
    scored = scored or config.max_length - config.max_prompt_length
    strategy, why = choose_strategy(
        config.segmentation,
        obstacle=obstacle,
        reduces_in_backward=choice.reduces_in_backward,
        segments=segments,
        shape=shape,
        few=few,
    )
    job = PlannedRun(
        config=config,
        choice=choice,
        cuda=cuda,
        rows_per_answer=shape.rows_per_answer,
        segment_rows=segments.rows or 1,
        strategy=strategy,
        why=why,
        whole_gradients=obstacle is None,
        reference=choose_mode(config, loss, share=second_model)[0],
        length=config.max_length,
        scored=scored,
        block_size=block_size,
        shares_clean=bool(block_size) and not meets,
        segment_tokens=segments.tokens,
    )
    return replace(job, segment_rows=segments.rows or max(1, segments.tokens // job.row_length))


def planned_engine(config: TrainConfig, *, cuda: bool, processes: int) -> EngineChoice:
    """The engine that the run would choose on such a machine. A GPU is taken to have bfloat16."""
    return choose_engine(resolve(config), processes=processes, cuda=cuda, bf16_able=cuda, adapter=config.adapts)  # type: ignore[arg-type]
