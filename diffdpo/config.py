"""Settings of a command, composed from those of its subjects, and what can be known wrong across them. No torch here.

Each field is a flag of the same name (see ``cli/flags.py``); its ``help`` is the flag's. ``None`` means "chosen for
you": what was chosen is printed and written to ``config.yaml``. What a subject checks alone stands beside its settings.
"""

import dataclasses
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from shlex import quote
from typing import Any, ClassVar, TypeVar

import yaml

from diffdpo.engine.choice import shards_parameters
from diffdpo.errors import UserError
from diffdpo.losses.settings import LossSettings
from diffdpo.models.checkpoint.adapter_folder import base_of_adapter, check_adapter, is_adapter
from diffdpo.settings.base import Settings, check_settings, converted, public, setting
from diffdpo.settings.credentials import taken
from diffdpo.settings.data import DataSettings, EncodingSettings
from diffdpo.settings.engine import EngineSettings
from diffdpo.settings.evaluation import EvaluationSettings
from diffdpo.settings.hub import HubSettings
from diffdpo.settings.model import LoraSettings, ModelSettings
from diffdpo.settings.noise import ESTIMATORS, NoiseSettings, scoring_estimator
from diffdpo.settings.output import OutputSettings
from diffdpo.settings.pairs import PairingSettings
from diffdpo.settings.reference import ReferenceSettings
from diffdpo.settings.sampling import SamplerGridSettings, SamplingSettings
from diffdpo.settings.segments import MemorySettings, SegmentSettings
from diffdpo.settings.tasks import PAIRS, task_names
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

    @property
    def policy(self) -> str | None:
        """The model to train by one name; where none is given, the base that an adapter names."""
        if self.adapter_name_or_path and not self.model_name_or_path:
            return base_of_adapter(self.adapter_name_or_path)
        return super().policy

    @property
    def recomputes(self) -> bool:
        """Whether a backward runs parts of the forward again."""
        return self.gradient_checkpointing or self.segmentation == "checkpoint"

    def check(self) -> None:
        """A model is no adapter, which has no weights of its own to start from, and an adapter is one."""
        if self.adapter_name_or_path:
            check_adapter(self.adapter_name_or_path)
        policy = self.model_name_or_path
        if policy and is_adapter(policy):
            raise UserError(
                f"--model_name_or_path {policy} is a LoRA adapter; go on with it as --adapter_name_or_path, or merge "
                f"it first: python launch/export.py --adapter {quote(policy)} --output FOLDER"
            )


@dataclass(frozen=True, kw_only=True)
class TrainConfig(RunConfig, MemorySettings, ReferenceSettings, LossSettings, LoraSettings):
    """Preference training (``launch/train.py``)."""

    title: ClassVar[str] = "generated data"

    num_generated_pairs: int = setting(1600, "training pairs generated when --train_data is not given", at_least=1)

    def check(self) -> None:
        """What two subjects say against each other."""
        if self.reference == "adapter_off" and not self.adapts:
            raise UserError("--reference adapter_off needs --use_peft; without an adapter use --reference copy")
        if self.sync_ref_model and self.load_best_model_at_end:
            raise UserError(
                "--load_best_model_at_end goes back to an earlier policy and --sync_ref_model has moved the reference "
                "since; leave one of them out"
            )
        if self.reference == "adapter_start" and not self.adapter_name_or_path:
            raise UserError(
                "--reference adapter_start is the adapter that training goes on with; name it as "
                "--adapter_name_or_path, or use --reference adapter_off"
            )
        if self.load_in_4bit and shards_parameters(self):
            cuts = "FSDP2" if self.engine == "fsdp2" else "ZeRO-3"
            raise UserError(
                f"--load_in_4bit: bitsandbytes keeps the scales of a whole matrix beside its 4-bit numbers, and {cuts} "
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
        "does not say; 0: full attention; default: full, or as config.json says",
        at_least=0,
    )
    num_generated_answers: int = setting(
        200_000, "training answers generated when --train_data is not given", at_least=1
    )
    answer_mix: str | None = setting(None, "their qualities, such as clear=0.6,vague=0.4; default: as data_pipeline's")

    def check(self) -> None:
        """A new model has heads of one even size and blocks of its own, and answers on a canvas fit in a row."""
        size, rest = divmod(self.width, self.heads)
        if not self.policy and (rest or size % 2):
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
    adapter_name_or_path: str | None = setting(
        None, "folder of a LoRA adapter; without a model it is on the base that it names; default: none"
    )
    ref_model_name_or_path: str | None = setting(
        None, "a second model to compare with, under the same noise; default: none", common=True
    )
    block_size: int | None = setting(
        None, "tokens of a block, 0: full attention; default: as config.json says, which a2d-* do not", at_least=0
    )
    output: str | None = setting(
        None, "file to append to; ids already in it are skipped; default: standard output", common=True
    )
    score_estimator: str = scoring_estimator()
    num_mc_samples: int = setting(32, "forwards a score", at_least=1, common=True)
    batch_size: int = setting(8, "records scored at a time", at_least=1, common=True)
    segment_rows: int = setting(64, "rows in one forward", at_least=1, common=True)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...", common=True)
    dtype: str = setting(
        "auto",
        "of the weights; auto: bfloat16 on a GPU that has it, else float32; float64: scores are too",
        choices=("auto", "float32", "bfloat16", "float64"),
        common=True,
    )
    load_in_4bit: bool = setting(False, "hold the weights in NF4 (bitsandbytes)", common=True)

    def check(self) -> None:
        """A device that torch could know, an adapter that is there, and a place for the output."""
        if self.adapter_name_or_path:
            check_adapter(self.adapter_name_or_path)
        check_device_and_output(self.device, self.output)


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig(SamplerGridSettings, NoiseSettings, EncodingSettings):
    """Models on tasks (``launch/evaluate.py``)."""

    title: ClassVar[str] = "what is evaluated, and how"

    model_name_or_path: str | None = setting(
        None,
        "folders, names, adapters, checkpoints/step-N or a run's folder; the first is compared with; default: bundled",
        common=True,
        many=True,
    )
    ref_model_name_or_path: str | None = setting(None, "rewards of pairs are against it; default: none", common=True)
    block_size: int | None = setting(
        None, "tokens of a block, 0: full attention; default: as config.json says, which a2d-* do not", at_least=0
    )
    task: str | None = setting(
        None,
        "pairs, perplexity, multiple_choice or a verifier (see docs/evaluation.md), each with @FILE for its own items",
        common=True,
        many=True,
    )
    pairs: str | None = setting(
        None,
        ".jsonl(.gz), .json, .csv, .parquet, folder or data set that tasks take their items from",
        common=True,
        many=True,
    )
    output: str | None = setting(
        None,
        "FILE.json of the results; FILE.items/ keeps every item's, where a broken-off run goes on",
        common=True,
    )
    limit: int = setting(0, "the first items of each task; 0: all", at_least=0, common=True)
    num_generated: int = setting(200, "items of arithmetic and multiple_choice where no file is named", at_least=1)
    beta: float = setting(0.1, "of rewards under a reference, as in training", above=0)
    score_estimator: str = scoring_estimator()
    num_mc_samples: int = setting(16, "forwards a score (n)", at_least=1, common=True)
    batch_size: int = setting(8, "items of one process at a time", at_least=1, common=True)
    segment_rows: int = setting(64, "rows in one forward of scores", at_least=1)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...", common=True)
    dtype: str = setting("float32", "of the weights", choices=("float32", "bfloat16"), common=True)
    load_in_4bit: bool = setting(False, "NF4 weights (bitsandbytes)")
    tracking_uri: str | None = setting(None, "MLflow store for the results; default: none", common=True)
    experiment_name: str = setting("diffdpo", "MLflow experiment")
    run_name: str | None = setting(None, "of the MLflow run; default: evaluate and the model's name")

    def check(self) -> None:
        """There are tasks, a device that torch could know and a place for the output."""
        check_device_and_output(self.device, self.output)
        if not self.task and not self.pairs:
            raise UserError("nothing to evaluate on: give --pairs FILE, or --task, such as --task arithmetic")
        task_names(self.task or PAIRS, flag="--task")


@dataclass(frozen=True, kw_only=True)
class PairsConfig(PairingSettings, SamplingSettings):
    """Pairs of a model's own answers (``launch/make_pairs.py``)."""

    title: ClassVar[str] = "what is asked, of whom"

    prompts: str | None = setting(
        None, "prompts (.txt, JSON lines) or training data; default: generated problems in arithmetic", common=True
    )
    num_prompts: int | None = setting(
        None, "the first so many; default: all, of generated ones 200", at_least=1, common=True
    )
    output_dir: str | None = setting(None, "folder of answers, pairs and shards; required", common=True)
    model_name_or_path: str | None = setting(
        None, "folder, hub name or adapter folder; default: the bundled model", common=True
    )
    adapter_name_or_path: str | None = setting(
        None, "folder of a LoRA adapter; without a model it is on the base that it names; default: none"
    )
    block_size: int | None = setting(
        None, "tokens of a block, 0: full attention; default: as config.json says, which a2d-* do not", at_least=0
    )
    template: str = setting("auto", "auto: chat if there is one", choices=("auto", "chat", "plain"))
    seed: int = setting(0, "of the sampling noise, of which pairs are taken, and of generated problems", at_least=0)
    device: str = setting("auto", "auto, cpu, cuda, cuda:1, ...")
    dtype: str = setting("float32", "of the weights", choices=("float32", "bfloat16", "float16"))
    load_in_4bit: bool = setting(False, "NF4 weights (bitsandbytes)")

    def check(self) -> None:
        """An adapter that is there; and several answers to a prompt that can differ."""
        if self.adapter_name_or_path:
            check_adapter(self.adapter_name_or_path)
        if not self.temperature and self.remasking != "random":
            raise UserError("--temperature 0 gives the same answer every time, and a pair needs two; make it larger")


@dataclass(frozen=True, kw_only=True)
class RoundsConfig(Settings):
    """Rounds of sample, pair and train (``launch/iterate.py``), beside the settings of the two commands they run."""

    title: ClassVar[str] = "rounds"

    output_dir: str | None = setting(None, "folder of all rounds; required", common=True)
    rounds: int = setting(4, "how many", at_least=1, common=True)
    model_name_or_path: str | None = setting(None, "the model to start from; default: the bundled one", common=True)
    adapter_name_or_path: str | None = setting(
        None, "LoRA adapter to start from: every round goes on with the last's; default: none"
    )
    prompts: str | None = setting(
        None, "prompts (.txt, JSON lines) or training data; default: generated problems in arithmetic", common=True
    )
    prompts_per_round: int | None = setting(
        None, "no prompt comes twice; default: all prompts over all rounds, of generated ones 200", at_least=1
    )
    round_reference: str = setting(
        "last",
        "the reference of a round: the model it starts from, the first model, or a moving average of all so far",
        choices=("last", "start", "average"),
        common=True,
    )
    average_decay: float = setting(0.5, "of --round_reference average: weight of the average so far", above=0, below=1)
    launcher: str | None = setting(None, "what starts several processes, such as torchrun --nproc_per_node 8")
    seed: int = setting(0, "of all rounds", at_least=0)
    tracking_uri: str | None = setting(None, "as train's; one parent run, a child run a round")
    experiment_name: str = setting("diffdpo", "as train's")

    def check(self) -> None:
        """A folder, and a start that is there."""
        if not self.output_dir:
            raise UserError("output_dir is missing: name the folder of all rounds, in the recipe or as --output_dir")
        if self.adapter_name_or_path:
            check_adapter(self.adapter_name_or_path)
        if self.model_name_or_path and is_adapter(self.model_name_or_path):
            raise UserError(f"model_name_or_path {self.model_name_or_path} is an adapter: use adapter_name_or_path")


Config = TypeVar("Config", bound=Settings)


def check_device_and_output(device: str, output: str | None) -> None:
    """UserError for a device that torch could not know, and for an output without a folder to stand in."""
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device) and not _is_registered(device):
        raise UserError(f"--device {device}: use auto, cpu, cuda or cuda:N")
    if output and not Path(output).absolute().parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {Path(output).parent}; make it first")


def _is_registered(device: str) -> bool:
    """Whether somebody has added such a kind of GPU."""
    from diffdpo.gpus import KINDS  # torch, which the usual names do not need

    return device.split(":")[0] in KINDS


def make_config(config_class: type[Config], values: Mapping[str, Any]) -> Config:
    """The checked dataclass; what can be known wrong without opening a model ends here.

    Who asks a tracking server is no setting: it goes to the environment, so that no record of the settings holds it.
    """
    if isinstance(uri := values.get("tracking_uri"), str):
        values = {**values, "tracking_uri": taken(uri)}
    config = config_class(**values)
    check_settings(config)
    if isinstance(config, RunConfig):
        shards = shards_parameters(config)  # whatever is asked of it: mistakes in the DeepSpeed JSON are named here
        if config.torch_compile and shards and config.engine != "fsdp2":
            # measured: a graph between every two hooks, 96 in place of 6, and a step of 1.3 times the time
            raise UserError(
                "--torch_compile gains nothing under ZeRO-3: DeepSpeed fetches weights between the operations that a "
                "graph would join; leave it out, or use stage 2 or --engine fsdp2"
            )
        if config.torch_compile and config.sequence_parallel_size > 1:
            raise UserError("--torch_compile has not been seen to work with --sequence_parallel_size; leave one out")
    return config


def resolve(config: RunConfig) -> RunConfig:
    """The learning rate, where none is given, follows what is trained. UserError where the schedule ends above it."""
    if config.learning_rate is not None:
        return config
    rate = FULL_RATE if config.policy else BUNDLED_RATE
    if config.adapts:
        rate = LORA_RATE
    config.check_peak(rate)
    return dataclasses.replace(config, learning_rate=rate)


def bundled_settings() -> dict[str, Any]:
    """The settings of preference training where neither a model nor data is named."""
    recipe = yaml.safe_load(BUNDLED_RECIPE.read_text())
    return {name: converted(TrainConfig, name, value) for name, value in recipe.items()}


def with_bundled_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Preference training's settings, with the bundled ones where neither a model nor data is named."""
    if any(given.get(name) for name in ("model_name_or_path", "adapter_name_or_path", "train_data")):
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
