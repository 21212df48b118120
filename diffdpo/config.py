"""Settings of a command, composed from those of its subjects, and what can be known wrong across them. No torch here.

Each field is a flag of the same name (see ``cli/flags.py``); its ``help`` is the flag's. ``None`` means "chosen for
you": what was chosen is printed and written to ``config.yaml``. What a subject checks alone stands beside its settings.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import yaml

from diffdpo.engine.choice import shards_parameters
from diffdpo.errors import UserError
from diffdpo.losses.settings import LossSettings
from diffdpo.models.checkpoint.adapter_folder import is_adapter
from diffdpo.settings.base import Settings, check_settings, converted, public, setting
from diffdpo.settings.credentials import taken
from diffdpo.settings.data import DataSettings, EncodingSettings
from diffdpo.settings.engine import EngineSettings
from diffdpo.settings.evaluation import EvaluationSettings
from diffdpo.settings.hub import HubSettings
from diffdpo.settings.model import LoraSettings, ModelSettings
from diffdpo.settings.noise import ESTIMATORS, NoiseSettings
from diffdpo.settings.output import OutputSettings
from diffdpo.settings.reference import ReferenceSettings
from diffdpo.settings.segments import MemorySettings, SegmentSettings
from diffdpo.settings.tracking import TrackingSettings

# What preference training takes where neither a model nor data is named: settings that suit what comes with diffdpo
BUNDLED_RECIPE = Path(__file__).parent / "pretrained" / "arithmetic" / "train.yaml"
FULL_RATE, LORA_RATE, BUNDLED_RATE = 5e-7, 5e-6, 1e-4  # VRPO's for 8B; the usual tenfold for LoRA; for 1M parameters


@dataclass(frozen=True, kw_only=True)
class RunConfig(
    HubSettings,
    TrackingSettings,
    EvaluationSettings,
    OutputSettings,
    EngineSettings,
    SegmentSettings,
    NoiseSettings,
    DataSettings,
    ModelSettings,
):
    """What ``launch/train.py`` and ``launch/sft.py`` share."""

    def check(self) -> None:
        """An adapter cannot be trained on: it has no weights of its own to start from."""
        policy = self.model_name_or_path
        if policy and is_adapter(policy):
            raise UserError(
                f"--model_name_or_path {policy} is a LoRA adapter; merge it first: "
                f"python launch/export.py --adapter {policy} --output FOLDER"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig, MemorySettings, ReferenceSettings, LossSettings, LoraSettings):
    """Preference training (``launch/train.py``)."""

    title: ClassVar[str] = "generated data"

    num_generated_pairs: int = setting(1600, "training pairs generated when --train_data is not given", at_least=1)

    def check(self) -> None:
        """What two subjects say against each other."""
        if self.reference == "adapter_off" and not self.use_peft:
            raise UserError("--reference adapter_off needs --use_peft; without an adapter use --reference copy")
        if self.load_in_4bit and self.engine == "fsdp2":
            raise UserError(
                "--load_in_4bit: bitsandbytes keeps the scales of a whole matrix beside its 4-bit numbers, and FSDP2 "
                "would cut the numbers alone; use --ds_config ds_configs/zero2.json, or leave --load_in_4bit out"
            )


@dataclass(frozen=True, kw_only=True)
class SftConfig(RunConfig):
    """Supervised training with the masked-diffusion loss (``launch/sft.py``)."""

    title: ClassVar[str] = "a new model, and generated data"

    model_name_or_path: str | None = setting(
        None, "model to go on from; default: a new one of the size below", common=True
    )
    learning_rate: float | None = setting(2e-3, "peak learning rate", at_least=0, common=True)
    per_device_train_batch_size: int = setting(64, "records in a micro-batch of one process", at_least=1, common=True)
    per_device_eval_batch_size: int = setting(64, "records in a batch of one process in evaluation", at_least=1)
    warmup_steps: int | float = setting(100, "steps of linear warm-up, or their share of all", at_least=0, share=True)
    weight_decay: float = setting(0.05, "AdamW's, on matrices only", at_least=0)
    score_estimator: str = setting(
        "mask_count", "how masks and weights are drawn; see docs/theory.md", known=("auto", *ESTIMATORS), common=True
    )
    num_mc_samples: int = setting(1, "masks drawn for an answer in a step (n)", at_least=1, common=True)
    eval_steps: int | float = setting(
        500,
        "steps between evaluations, or their share of all; 0: before and after",
        at_least=0,
        share=True,
        common=True,
    )
    answer_canvas: int = setting(
        0, "fill half of the answers up to so many tokens with terminators; 0: none", at_least=0
    )
    width: int = setting(128, "of a new model", at_least=1)
    layers: int = setting(4, "of a new model", at_least=1)
    heads: int = setting(4, "of a new model", at_least=1)
    vocab_size: int = setting(512, "most tokens of a new model's tokenizer: 256 bytes and 3 signs first", at_least=259)
    block_size: int | None = setting(
        None,
        "of a new model: block diffusion in blocks of so many tokens (SDAR's layout); of a named one: what config.json "
        "does not say; 0: full attention",
        at_least=0,
    )
    num_generated_answers: int = setting(
        200_000, "training answers generated when --train_data is not given", at_least=1
    )
    answer_mix: str | None = setting(None, "their qualities, such as clear=0.6,vague=0.4; default: as data_pipeline's")

    def check(self) -> None:
        """A new model has heads of one even size and blocks of its own, and answers on a canvas fit in a row."""
        size, rest = divmod(self.width, self.heads)
        if not self.model_name_or_path and (rest or size % 2):
            raise UserError(
                f"--width {self.width} and --heads {self.heads}: the width must be an even number for each head, such "
                f"as --width {self.heads * max(2, size + size % 2)}"
            )
        room = self.max_length - self.max_prompt_length
        if self.answer_canvas > room:
            raise UserError(
                f"--answer_canvas {self.answer_canvas}: a prompt of --max_prompt_length {self.max_prompt_length} leaves"
                f" {room} tokens of --max_length {self.max_length}; make it smaller, or raise --max_length"
            )


@dataclass(frozen=True, kw_only=True)
class ScoreConfig(NoiseSettings, EncodingSettings):
    """Scores of a file of pairs (``launch/score.py``)."""

    title: ClassVar[str] = "what is scored, and how"

    pairs: str | None = setting(None, ".jsonl(.gz), .json, .csv, .parquet, folder or data set; required", common=True)
    model_name_or_path: str | None = setting(
        None, "folder, hub name or adapter folder; default: the bundled model", common=True
    )
    ref_model_name_or_path: str | None = setting(
        None, "a second model to compare with, under the same noise; default: none", common=True
    )
    block_size: int | None = setting(
        None, "tokens of a block, where config.json does not say (a2d-*); 0: full attention", at_least=0
    )
    output: str | None = setting(
        None, "file to append to; ids already in it are skipped; default: standard output", common=True
    )
    num_mc_samples: int = setting(32, "forwards a score", at_least=1, common=True)
    batch_size: int = setting(8, "records scored at a time", at_least=1, common=True)
    segment_rows: int = setting(64, "rows in one forward", at_least=1, common=True)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...", common=True)
    dtype: str = setting("float32", "of the weights", choices=("float32", "bfloat16"), common=True)

    def check(self) -> None:
        """A device that torch could know, and a place for the output."""
        if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", self.device):
            raise UserError(f"--device {self.device}: use auto, cpu, cuda or cuda:N")
        if self.output and not Path(self.output).absolute().parent.is_dir():
            raise UserError(f"--output {self.output}: there is no folder {Path(self.output).parent}; make it first")


Config = TypeVar("Config", bound=Settings)


def make_config(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The checked dataclass; what can be known wrong without opening a model ends here.

    Who asks a tracking server is no setting: it goes to the environment, so that no record of the settings holds it.
    """
    if isinstance(uri := values.get("tracking_uri"), str):
        values = {**values, "tracking_uri": taken(uri)}
    config = config_class(**values)
    check_settings(config)
    if isinstance(config, RunConfig) and shards_parameters(config) and config.torch_compile:
        raise UserError(
            "--torch_compile has not been seen to work under ZeRO-3 and FSDP2; leave it out, or use stage 2"
        )
    return config


def resolve(config: RunConfig) -> RunConfig:
    """The learning rate, where none is given, follows what is trained. UserError where the schedule ends above it."""
    if config.learning_rate is not None:
        return config
    rate = FULL_RATE if config.model_name_or_path else BUNDLED_RATE
    if isinstance(config, TrainConfig) and config.use_peft:
        rate = LORA_RATE
    config.check_peak(rate)
    return dataclasses.replace(config, learning_rate=rate)


def bundled_settings() -> dict[str, Any]:
    """The settings of preference training where neither a model nor data is named."""
    recipe = yaml.safe_load(BUNDLED_RECIPE.read_text())
    return {name: converted(TrainConfig, name, value) for name, value in recipe.items()}


def with_bundled_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Preference training's settings, with the bundled ones where neither a model nor data is named."""
    if given.get("model_name_or_path") or given.get("train_data"):
        return dict(given)
    bundled = bundled_settings()
    if "loss_type" in given:
        bundled.pop("sft_weight", None)  # it goes with the loss of the recipe
    return {**bundled, **given}


def usual_settings(config: RunConfig) -> dict[str, Any]:
    """What a command would have taken by itself in place of these settings, where that is not a field's default."""
    of_training = isinstance(config, TrainConfig) and not (config.model_name_or_path or config.train_data)
    return bundled_settings() if of_training else {}


def to_yaml(config: RunConfig) -> str:
    """The settings as a recipe that gives the same run, from its start even if it was resumed. Secrets are left out."""
    return yaml.safe_dump(public(config) | {"resume_from_checkpoint": None}, sort_keys=False)
