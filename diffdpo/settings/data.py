"""Which records a run reads, in which order, and how they become tokens."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from data_pipeline.names import source_names
from data_pipeline.sources.columns import parse_columns
from diffdpo.errors import UserError
from diffdpo.settings.base import Settings, setting


@dataclass(frozen=True, kw_only=True)
class EncodingSettings(Settings):
    """How a record becomes tokens."""

    title: ClassVar[str] = "encoding"

    max_length: int = setting(1024, "most tokens of prompt and answer together", at_least=1, common=True)
    max_prompt_length: int = setting(512, "most tokens of the prompt", at_least=1)
    truncation: str = setting(
        "keep_end", "what stays of a prompt that does not fit", choices=("keep_end", "keep_start", "drop")
    )
    answer_truncation: str = setting(
        "cut", "an answer that does not fit: cut, without terminator, or left out", choices=("cut", "drop")
    )
    template: str | None = setting(
        None,
        "chat: a string is a user's turn; auto: only messages are; default: chat where the tokenizer has a template",
        choices=("auto", "chat", "plain"),
    )

    def check(self) -> None:
        """A prompt must leave room for an answer."""
        if self.max_prompt_length >= self.max_length:
            raise UserError(
                f"--max_prompt_length {self.max_prompt_length} leaves no room for an answer in "
                f"--max_length {self.max_length}; make it smaller"
            )


@dataclass(frozen=True, kw_only=True)
class DataSettings(EncodingSettings):
    """Which records, in which order."""

    title: ClassVar[str] = "data"

    train_data: str | None = setting(
        None,
        "files, folders, shards, URLs or names of data sets; see docs/data.md; default: generated",
        common=True,
        many=True,
    )
    columns: str | None = setting(
        None,
        "which columns are what, such as prompt=question,chosen=good,rejected=bad; default: known by their names",
    )
    data_weights: str | None = setting(
        None, "shares of the sources of --train_data in an epoch, such as 3 1; default: each whole", many=True
    )
    eval_data: str | None = setting(
        None,
        "the same for held-out data; default: a part of --train_data, split by prompt",
        common=True,
        many=True,
    )
    eval_fraction: float = setting(
        0.1, "share of the prompts held out when --eval_data is not given", at_least=0, below=1
    )
    data_cache_dir: str | None = setting(None, "where unsharded data is sharded once; default: beside --output_dir")
    shuffle_shards: int | None = setting(
        None, "shuffle over groups of so many shards; 0: over all; default: 8 for remote shards, else 0", at_least=0
    )
    bucket_steps: int = setting(0, "bring records of like length together over so many steps; 0: do not", at_least=0)
    batching: str = setting(
        "equal", "micro-batches of a step: of one size, or of like numbers of tokens", choices=("equal", "balanced")
    )
    tail: str = setting("pad", "last step of an epoch: filled with empty slots, or left out", choices=("pad", "drop"))
    max_fault_fraction: float = setting(0.01, "stop when more of the records than this cannot be read", at_least=0)
    allow_damaged: bool = setting(False, "go on with what is left of shards that are cut or missing")
    strict: bool = setting(False, "stop at a record that cannot be read, instead of skipping and counting it")
    dataset_num_workers: int = setting(
        0, "processes that read and tokenise; 0: a thread of the training process", at_least=0
    )

    def check(self) -> None:
        """Sources that are not there, and options that contradict."""
        if self.eval_data and not self.train_data:
            raise UserError(
                "--eval_data goes with --train_data; without that, both are generated: give it, or leave it out"
            )
        for name, text in (("train_data", self.train_data), ("eval_data", self.eval_data)):
            for source in source_names(text or ""):
                looks_local = "://" not in source and not any(c in source for c in "*?[{")
                if looks_local and Path(source).suffix and not Path(source).exists():
                    raise UserError(f"--{name} {source}: no such file")
        parse_columns(self.columns)
        if self.max_fault_fraction > 1.0:
            raise UserError(f"--max_fault_fraction is {self.max_fault_fraction}; it must be in [0, 1]")
        if self.strict and self.allow_damaged:
            raise UserError("--strict stops at what --allow_damaged goes on without; leave one of the two out")
        self._check_weights()

    def _check_weights(self) -> None:
        weights = self.weights_of_sources()
        if weights is None:
            return
        sources = len(source_names(self.train_data)) if self.train_data else 0
        if len(weights) != sources or not all(0 <= weight < math.inf for weight in weights) or not any(weights):
            raise UserError(
                f"--data_weights {self.data_weights}: give one number, at least 0, for each of the {sources} sources "
                "of --train_data, not all 0"
            )
        if self.shuffle_shards:
            raise UserError(
                "--shuffle_shards is of no use with --data_weights, which mixes all of the data; leave one out"
            )

    def weights_of_sources(self) -> list[float] | None:
        """``--data_weights`` as numbers."""
        if self.data_weights is None:
            return None
        try:
            return [float(weight) for weight in self.data_weights.split(",")]
        except ValueError:
            raise UserError(f"--data_weights {self.data_weights}: give numbers with commas, such as 3,1") from None
