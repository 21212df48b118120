"""The models of an evaluation: what the names of ``--model_name_or_path`` stand for."""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data_pipeline.names import source_names
from diffdpo.config import EvaluateConfig
from diffdpo.errors import UserError
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.load import LoadedModel, load_model, load_tokenizer_and_spec
from diffdpo.reference.identity import tokenizer_digest, weights_digest
from diffdpo.training.checkpoint_model import (
    base_of_checkpoint,
    block_size_of_checkpoint,
    checkpoint_digest,
    is_checkpoint,
    is_run,
    load_checkpoint,
    models_of_run,
)

IN_MEMORY = "the model in memory"


@dataclass(frozen=True)
class Candidate:
    """A model to be evaluated. ``step``: of training, where it is known; ``run``: what it is a moment of."""

    name: str
    label: str
    run: str
    step: int | None = None

    @property
    def tokenizer_of(self) -> str:
        """Where its tokenizer lies."""
        return base_of_checkpoint(self.name) if is_checkpoint(self.name) else self.name

    def block_size(self, asked: int | None) -> int | None:
        """Tokens of a block where its config does not say: a checkpoint's run has said it."""
        return block_size_of_checkpoint(self.name) if is_checkpoint(self.name) else asked

    def digest(self) -> str:
        """16 hex digits of its weights."""
        if not is_checkpoint(self.name):
            return weights_digest(self.name)
        both = f"{weights_digest(base_of_checkpoint(self.name))} {checkpoint_digest(self.name)}"
        return hashlib.blake2b(both.encode(), digest_size=8).hexdigest()

    def load(self, config: EvaluateConfig, device: str) -> LoadedModel:
        """The model, in eval mode, on the device."""
        options: dict[str, Any] = {"dtype": config.dtype, "device": device, "load_in_4bit": config.load_in_4bit}
        loaded = (
            load_checkpoint(self.name, **options)
            if is_checkpoint(self.name)
            else load_model(self.name, **options, block_size=config.block_size)
        )
        loaded.model.eval()
        return loaded


def candidates_of(config: EvaluateConfig) -> list[Candidate]:
    """The models that are named, a run's folder as all that it has kept. UserError for one that is named twice."""
    named = model_or_bundled(config.model_name_or_path)
    found = [each for name in source_names(named) for each in _candidates(name)]
    if twice := {each.name for each in found if [other.name for other in found].count(each.name) > 1}:
        raise UserError(f"--model_name_or_path names {twice.pop()} twice; name it once")
    labels = [each.label for each in found]
    return [
        each if labels.count(each.label) == 1 else Candidate(each.name, each.name, each.run, each.step)
        for each in found
    ]


def _candidates(name: str) -> Iterator[Candidate]:
    if is_run(name):
        run = Path(name).resolve()
        for step, model in models_of_run(name):
            yield Candidate(model, f"{run.name} step {step}", run.name, step)
    elif is_checkpoint(name):
        path = Path(name).resolve()
        of, step = path.parents[1].name, int(path.name.split("-")[1])
        yield Candidate(name, f"{of} step {step}", of, step)
    else:
        folder = Path(name)
        last = folder.resolve().name if folder.is_dir() else name
        label = f"{folder.resolve().parent.name}/final" if last == "final" else last
        yield Candidate(name, label, label)


def check_candidates(candidates: Sequence[Candidate], reference: str | None, *, block_size: int | None = None) -> None:
    """UserError for a model without config or tokenizer, and for two that read text in different tokens."""
    named = [(each.tokenizer_of, each.block_size(block_size)) for each in candidates]
    named += [(reference, block_size)] if reference else []
    tokenizers = [load_tokenizer_and_spec(name, block_size=size)[0] for name, size in named]
    names = [name for name, _ in named]
    for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True):
        if tokenizer_digest(tokenizer) != tokenizer_digest(tokenizers[0]):
            raise UserError(
                f"{name} reads text in other tokens than {names[0]}: scores are sums over tokens, so they do not "
                "compare; evaluate the two by themselves"
            )
