"""What each round of ``diffdpo iterate`` does: settings of its two commands, as values that follow from the recipe.

Round r samples from the policy that round r-1 has left, and trains that policy further. Everything lies in
``round-r`` of the output folder; nothing of it depends on when or how often the rounds were interrupted.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from diffdpo.config import RoundsConfig
from diffdpo.errors import UserError
from diffdpo.models.bundled import model_or_bundled
from diffdpo.onpolicy.questions import Asked, Question, generated_questions, read_questions

GENERATED_A_ROUND = 200
PARENT_TAG = "mlflow.parentRunId"  # by which MLflow shows a run under another
LORA = ("use_peft", "lora_r", "lora_alpha", "lora_target_modules", "lora_modules_to_save", "use_dora", "use_rslora")
NEW_ADAPTER = (*LORA, "train_router")
OURS = {
    "make_pairs": {
        *("output_dir", "model_name_or_path", "adapter_name_or_path", "prompts", "num_prompts", "seed"),
    },
    "train": {
        *("output_dir", "model_name_or_path", "model_revision", "adapter_name_or_path", "train_data", "run_name"),
        *("ref_model_name_or_path", "resume_from_checkpoint", "seed", "tracking_uri", "experiment_name"),
        *("data_cache_dir", "reference_cache", "precompute_only", "num_generated_pairs"),
    },
}
"""Settings of the commands that the rounds set themselves."""


@dataclass(frozen=True)
class Rounds:
    """The recipe: ``config`` of the rounds, and settings for the two commands."""

    config: RoundsConfig
    make_pairs: Mapping[str, Any]
    train: Mapping[str, Any]

    def __post_init__(self) -> None:
        for command, ours in OURS.items():
            for name in getattr(self, command):
                if name in ours:
                    raise UserError(f"{command}: {name} is set by the rounds; leave it out there")
        if self.config.round_reference == "average" and self.adapts:
            raise UserError(
                "round_reference average: the average of adapters' factors is not the average of what they add to the "
                "weights; use last or start, or train all weights"
            )
        if self.train.get("reference") in ("adapter_off", "adapter_start", "none"):
            raise UserError(f"train: reference {self.train['reference']}: say round_reference start or last instead")
        verifier = self.make_pairs.get("verifier", "arithmetic")
        if verifier == "none" or verifier.startswith("scores:"):
            raise UserError(
                f"make_pairs: verifier {verifier}: a round judges answers that nobody has seen; name a verifier, or a "
                "function of your own (module:function)"
            )
        if self.config.prompts and not self.train.get("eval_data"):
            raise UserError("train: eval_data is missing: name held-out pairs or problems, the same for every round")

    @property
    def adapts(self) -> bool:
        """Whether an adapter is trained."""
        return bool(self.config.adapter_name_or_path or self.train.get("use_peft"))

    @property
    def folder(self) -> Path:
        """The folder of all rounds."""
        assert self.config.output_dir is not None
        return Path(self.config.output_dir).absolute()

    def of(self, number: int) -> Path:
        """The folder of a round, counted from 1."""
        return self.folder / f"round-{number}"

    def final(self, number: int) -> Path:
        """The model, or adapter, that a round leaves."""
        return self.of(number) / "train" / "final"

    def average(self, number: int) -> Path:
        """The moving average after a round."""
        return self.of(number) / "average"

    def policy(self, number: int) -> dict[str, str]:
        """Whom a round samples from and trains, as settings."""
        config = self.config
        if number == 1:
            start = {
                "model_name_or_path": config.model_name_or_path,
                "adapter_name_or_path": config.adapter_name_or_path,
            }
            if not config.adapter_name_or_path:
                start["model_name_or_path"] = model_or_bundled(config.model_name_or_path)
            return {name: value for name, value in start.items() if value}
        if not self.adapts:
            return {"model_name_or_path": str(self.final(number - 1))}
        named = {"model_name_or_path": config.model_name_or_path} if config.model_name_or_path else {}
        return named | {"adapter_name_or_path": str(self.final(number - 1))}

    def pairs_settings(self, number: int) -> dict[str, Any]:
        """A round's settings of ``make-pairs``."""
        where = {"prompts": str(self.of(number) / "prompts.jsonl"), "output_dir": str(self.of(number) / "pairs")}
        return {**self.make_pairs, **self.policy(number), **where, "seed": self.config.seed * 1000 + number}

    def train_settings(self, number: int, *, tracking_uri: str, parent: str | None = None) -> dict[str, Any]:
        """A round's settings of ``train``; ``parent``: the MLflow run of all rounds."""
        config, given = self.config, dict(self.train)
        policy = self.policy(number)
        if "adapter_name_or_path" in policy:  # an adapter that is there has its own rank and places
            given = {name: value for name, value in given.items() if name not in NEW_ADAPTER}
        tags = [str(given.pop("run_tags", None) or ""), f"{PARENT_TAG}={parent}" if parent else ""]
        return {
            "eval_data": str(self.folder / "held_out.jsonl"),
            "eval_task": self.task(),
            **given,
            **policy,
            **self.reference(number),
            "train_data": str(self.of(number) / "pairs" / "shards"),
            "output_dir": str(self.of(number) / "train"),
            "data_cache_dir": str(self.folder / "data_cache"),
            "resume_from_checkpoint": "auto",
            "run_name": f"{self.folder.name}-round-{number}",
            "seed": config.seed * 1000 + number,
            "tracking_uri": tracking_uri,
            "experiment_name": config.experiment_name,
            "run_tags": ",".join(filter(None, tags)) or None,
        }

    def task(self) -> str:
        """Who judges the answers to held-out problems unless ``train`` says: the verifier of the pairs."""
        return self.make_pairs.get("verifier", "arithmetic")

    def reference(self, number: int) -> dict[str, str]:
        """The reference of a round, as settings; nothing where it is the policy as the round starts."""
        config = self.config
        if number == 1 or config.round_reference == "last":
            return {}
        if config.round_reference == "average":
            return {"ref_model_name_or_path": str(self.average(number - 1))}
        if config.adapter_name_or_path:
            return {"ref_model_name_or_path": config.adapter_name_or_path}
        if self.adapts and not self.train.get("reference"):
            return {"reference": "adapter_off"}
        return {"ref_model_name_or_path": model_or_bundled(config.model_name_or_path)}


def deal(config: RoundsConfig) -> tuple[list[list[Question]], Asked]:
    """The prompts of each round, none in two. UserError where there are not enough."""
    import numpy as np

    if not config.prompts:
        each = config.prompts_per_round or GENERATED_A_ROUND
        asked = generated_questions(each * config.rounds, seed=config.seed)
        pool = asked.questions
    else:
        asked = read_questions(config.prompts)
        each = config.prompts_per_round or len(asked.questions) // config.rounds
        order = np.random.Generator(np.random.Philox(config.seed)).permutation(len(asked.questions))
        pool = [asked.questions[i] for i in order]
    if not each or each * config.rounds > len(pool):
        raise UserError(
            f"prompts {config.prompts}: {len(pool)} distinct prompts are too few for {config.rounds} rounds of "
            f"{max(1, each)}; give more, or a smaller rounds or prompts_per_round"
        )
    return [pool[r * each : (r + 1) * each] for r in range(config.rounds)], asked


def as_row(question: Question) -> dict[str, Any]:
    """A question as ``read_questions`` reads it back."""
    row: dict[str, Any] = {"id": question.key, "prompt": question.prompt}
    if question.answer:
        chat = not isinstance(question.prompt, str)
        row["completion"] = [{"role": "assistant", "content": question.answer}] if chat else question.answer
    return row | ({"meta": {"answer": question.stated}} if question.stated is not None else {})
