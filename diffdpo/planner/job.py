"""What one process of a run would do, as far as memory and time depend on it: settings resolved by the run's rules."""

from collections.abc import Callable
from dataclasses import dataclass

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
    length: int  # tokens of a row
    scored: int  # positions scored in a row

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
        """Of a micro-batch."""
        return self.config.per_device_train_batch_size

    @property
    def rows(self) -> int:
        """Of a micro-batch."""
        return 2 * self.pairs * self.rows_per_answer

    @property
    def rows_at_once(self) -> int:
        """Rows of the largest forward with a graph."""
        most = {"none": self.rows, "deferred": self.rows_per_answer}.get(self.strategy, self.rows)
        return most if self.strategy == "none" else min(most, self.segment_rows)

    @property
    def segments(self) -> int:
        """Forwards with a graph in a micro-batch."""
        if self.strategy == "deferred":
            return 2 * self.pairs * -(-self.rows_per_answer // self.rows_at_once)
        return -(-self.rows // self.rows_at_once)

    @property
    def backwards(self) -> int:
        """Backwards of an optimizer step after which an engine reduces gradients."""
        per_micro = self.segments if self.strategy == "two_pass" else 1
        return per_micro * self.config.gradient_accumulation_steps

    @property
    def reference_rows(self) -> int:
        """Rows of a forward of the reference."""
        return min(self.rows, self.segment_rows)

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
) -> PlannedRun:
    """Settings → what a process would do. ``module``: what would be trained, on the meta device. ``second_model()``:
    the part of the memory that a copy of it would take, for ``--reference auto``. ``scored``: scored positions of a
    row; default: all of the longest answer."""
    few = trains_few(module)
    obstacle = choice.no_sync_obstacle(few=few)
    loss = config.loss()
    check_reference(config, loss)
    segments = make_segments(config, choice, torch.device("cuda" if cuda else "cpu"))
    shape = micro_batch_shape(config, couples_pairs=loss.couples_pairs)
    strategy, why = choose_strategy(
        config.segmentation,
        obstacle=obstacle,
        reduces_in_backward=choice.reduces_in_backward,
        segments=segments,
        shape=shape,
        few=few,
    )
    return PlannedRun(
        config=config,
        choice=choice,
        cuda=cuda,
        rows_per_answer=shape.rows_per_answer,
        segment_rows=segments.rows or max(1, segments.tokens // config.max_length),
        strategy=strategy,
        why=why,
        whole_gradients=obstacle is None,
        reference=choose_mode(config, loss, share=second_model)[0],
        length=config.max_length,
        scored=scored or config.max_length - config.max_prompt_length,
    )


def planned_engine(config: TrainConfig, *, cuda: bool, processes: int) -> EngineChoice:
    """The engine that the run would choose on such a machine. A GPU is taken to have bfloat16."""
    return choose_engine(resolve(config), processes=processes, cuda=cuda, bf16_able=cuda, adapter=config.use_peft)  # type: ignore[arg-type]
