"""What ``import diffdpo`` offers: training, evaluation, scoring and sampling from Python, a notebook included.

Settings are those of the commands, by the same names. Data are paths and names as on the command line, a list of
records (dicts) or a ``datasets.Dataset``; a model is a name, a folder or what :func:`load` gave. What a caller can mend
is raised as ``UserError`` or ``DataError`` (both are ``ValueError``); the interpreter is never ended.
"""

import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, TypeVar

import torch

from data_pipeline.cli import nearest
from data_pipeline.errors import DataError
from data_pipeline.records import Record
from diffdpo.cli.flags import own_names, own_settings
from diffdpo.config import EvaluateConfig, ScoreConfig, SftConfig, TrainConfig, make_config, with_bundled_settings
from diffdpo.engine.world import init_distributed
from diffdpo.errors import UserError
from diffdpo.evaluation.score_models import device_beside, device_named, load_models, model_names, settled
from diffdpo.evaluation.score_pairs import Scorer
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.checkpoint.adapter_folder import is_adapter
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.noise.estimators import check_estimator
from diffdpo.sampling.decode import Decoding, option_of, sample
from diffdpo.sampling.prompt import encode_prompt, prompts_of
from diffdpo.settings.base import Settings, converted, field_of, of_kind
from diffdpo.setup.handed_over import data_as_source, model_as_folder, name_of, records_of
from diffdpo.training import evaluation, preference, supervised
from diffdpo.training.callbacks import Callback, each_of
from diffdpo.training.run import Result

if not torch.cuda.is_available():
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which transformers looks for, warns of it

__all__ = ["Callback", "DataError", "Result", "UserError", "evaluate", "generate", "load", "score", "sft", "train"]

Data = str | Path | Sequence[str] | Iterable[Mapping[str, Any]]
"""A name or path, several of them, records, or a ``datasets.Dataset``."""
Model = str | Path | LoadedModel
Config = TypeVar("Config", bound=Settings)
OBJECTS = ("model_name_or_path", "ref_model_name_or_path", "train_data", "eval_data")
"""Settings of a run that may be more than text."""


def train(
    model: Model | None = None,
    train_data: Data | None = None,
    *,
    eval_data: Data | None = None,
    reference_model: Model | None = None,
    callbacks: Callback | Sequence[Callback] = (),
    **settings: Any,
) -> Result:
    """Align ``model`` with preference pairs; ``launch/train.py`` in Python. ``settings`` are its flags.

    Without a model the bundled one is trained, without data generated pairs are used. Training goes on with a model
    that is an adapter, by its folder or loaded. ``reference_model``: the frozen reference, by default the model as it
    starts. Under a launcher every process calls it alike. A ``datasets`` stream is read as far as ``max_steps`` needs.
    """
    told = each_of(callbacks)
    objects = {"model_name_or_path": model, "train_data": train_data, "eval_data": eval_data}
    objects["ref_model_name_or_path"] = reference_model
    return preference.train(_config(TrainConfig, objects, with_bundled_settings, settings), callbacks=told)


def sft(
    model: Model | None = None,
    train_data: Data | None = None,
    *,
    eval_data: Data | None = None,
    callbacks: Callback | Sequence[Callback] = (),
    **settings: Any,
) -> Result:
    """Supervised training with the masked-diffusion loss; ``launch/sft.py`` in Python. ``settings`` are its flags.

    Without a model a new one is made, of the size that ``width``, ``layers`` and ``heads`` say.
    """
    told = each_of(callbacks)
    objects = {"model_name_or_path": model, "train_data": train_data, "eval_data": eval_data}
    return supervised.sft(_config(SftConfig, objects, lambda values: values, settings), callbacks=told)


def score(
    pairs: Data, model: Model | None = None, *, reference: Model | None = None, **settings: Any
) -> list[dict[str, Any]]:
    """Diffusion scores of pairs, a dictionary a record, as ``launch/score.py`` writes them; ``settings`` are its flags.

    ``{"id", "chosen": {"score", "stderr", "tokens"}, "rejected": {...}}``: scores are sums over tokens in nats,
    ``stderr`` is None where a single sample says nothing of it. With a ``reference`` each side also has
    ``reference_score``, ``log_ratio`` and ``log_ratio_stderr``. Records that cannot be scored are left out, with one
    warning that counts them.
    """
    objects = {"model_name_or_path": model, "ref_model_name_or_path": reference}
    values = _with_objects(_checked(ScoreConfig, settings), objects)
    model, reference = values.pop("model_name_or_path", None), values.pop("ref_model_name_or_path", None)
    if values.pop("output", None) is not None:
        raise UserError("score gives its lines back and writes no output; `diffdpo score --output FILE` does")
    given = [each for each in (model, reference) if isinstance(each, LoadedModel)]
    config = settled(make_config(ScoreConfig, own_settings(ScoreConfig, values)), given)
    check_estimator(
        config.score_estimator,
        num_samples=config.num_mc_samples,
        num_diffusion_steps=config.num_diffusion_steps,
        trains=False,
    )
    models = [_scored(model, config)]
    if reference is not None:
        models.append(_scored(reference, replace(config, adapter_name_or_path=None)))
    if models[0].tokenizer.get_vocab() != models[-1].tokenizer.get_vocab():
        raise UserError("the reference has another vocabulary than the model; their scores do not compare")
    scorer = Scorer(models, config)
    records: Iterable[Record] = records_of(pairs)
    lines = [line for _, line in scorer(records)]
    if scorer.dropped:
        first, why = scorer.dropped[0]
        warnings.warn(
            f"{len(scorer.dropped)} records were left out, the first {first}: {why.reason} {why.detail}", stacklevel=2
        )
    return lines


def evaluate(
    pairs: Data | None = None,
    model: Model | Sequence[str | Path] | None = None,
    *,
    task: str | Sequence[str] | None = None,
    reference: Model | None = None,
    **settings: Any,
) -> dict[str, Any]:
    """Models on held-out pairs and tasks, as ``launch/evaluate.py`` writes them; ``settings`` are its flags.

    ``{"results": [...], "comparisons": [...]}``: a result for each model, task and way of sampling, whose ``figures``
    are ``{"mean", "stderr", "low", "high", "count"}`` by name; a comparison of each model with the first one on the
    same items. ``pairs``: what tasks take their items from; ``task``: their names, by default the pairs themselves.
    Several models are given by name. Under a launcher every process calls it alike.
    """
    cache = Path("outputs") / "data_cache"
    objects = {"model_name_or_path": model, "ref_model_name_or_path": reference, "pairs": pairs, "task": task}
    values = _with_objects(_checked(EvaluateConfig, settings), objects)
    model = values.pop("model_name_or_path", None)
    named = model if isinstance(model, (list, tuple)) else [model]
    given = model if isinstance(model, LoadedModel) else None
    if any(isinstance(each, LoadedModel) for each in named) and given is None:
        raise UserError("several models are given by name; a model in memory is evaluated by itself")
    if given is None and model is not None:
        values["model_name_or_path"] = [name_of(each) for each in named]
    if given is not None and given.dtype in field_of(EvaluateConfig, "dtype").metadata["choices"]:
        values.setdefault("dtype", given.dtype)  # what a reference is read in
    if values.get("ref_model_name_or_path") is not None:
        values["ref_model_name_or_path"] = model_as_folder(values["ref_model_name_or_path"], cache)
    if values.get("pairs") is not None:
        values["pairs"] = data_as_source(values["pairs"], "pairs", cache)
    config = make_config(EvaluateConfig, own_settings(EvaluateConfig, values))
    world = init_distributed()
    return evaluation.evaluate(config, world, given=given)


def generate(
    prompts: str | Sequence[str | Sequence[Mapping[str, str]]],
    model: Model | None = None,
    *,
    template: str = "auto",
    seed: int = 0,
    batch_size: int = 8,
    device: str = "auto",
    dtype: str | None = None,
    **settings: Any,
) -> list[str]:
    """One sampled answer a prompt, in order. A prompt is a text or a list of chat messages; one text is one prompt.

    ``settings`` are the fields of ``diffdpo.sampling.decode.Decoding`` (``gen_length``, ``temperature``, ...): unless
    ``steps`` is given, a token is revealed a step.
    """
    known = {item.name for item in fields(Decoding)}
    if unknown := sorted(set(settings) - known):
        raise UserError(f"generate knows no setting {unknown[0]}; known: {', '.join(sorted(known))}")
    seed, batch_size = of_kind("seed", seed, int), of_kind("batch_size", batch_size, int)
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}; it must be at least 1")
    settings = {name: option_of(name, value) for name, value in settings.items()}
    settings = {"steps": settings.get("gen_length", Decoding.gen_length), **settings}
    # what is wrong with them is told before a model is loaded
    Decoding(**{"block_length": settings.get("gen_length", Decoding.gen_length)} | settings)
    each_prompt = prompts_of(prompts)
    loaded = _loaded(model, device=device, dtype=dtype)
    encoded = [encode_prompt(prompt, loaded, template) for prompt in each_prompt]
    answers = sample(loaded.model, loaded.spec, encoded, seed=seed, batch_size=batch_size, **settings)
    return [str(loaded.tokenizer.decode(ids, skip_special_tokens=True)) for ids in answers]


def load(
    model: str | Path | None = None,
    *,
    device: str = "auto",
    dtype: str = "float32",
    load_in_4bit: bool = False,
    block_size: int | None = None,
) -> LoadedModel:
    """A model with its tokenizer and the facts of its family: a folder, a hub name, an adapter's folder (with its
    base), by default the bundled model. ``block_size``: where its config.json does not say."""
    name = model_or_bundled(None if model is None else name_of(model))
    options = {"load_in_4bit": load_in_4bit, "block_size": block_size}
    return load_model(name, device=device_named(device), dtype=dtype, **options)  # type: ignore[arg-type]


def _loaded(model: Model | None, *, device: str, dtype: str | None) -> LoadedModel:
    if not isinstance(model, LoadedModel):
        return load(model, device=device, dtype=dtype or "float32")
    device_beside(device, [model])
    if dtype not in (None, model.dtype):
        raise UserError(f"dtype is {dtype} and the model in memory is in {model.dtype}; leave dtype out, or load it so")
    return model


def _scored(model: Model | None, config: ScoreConfig) -> LoadedModel:
    """A model that pairs are scored under, as the settings have it read."""
    if isinstance(model, LoadedModel):
        _loaded(model, device="auto", dtype=config.dtype)
        if config.adapter_name_or_path or config.load_in_4bit:
            raise UserError(
                "adapter_name_or_path and load_in_4bit are for a model that is named; give load what it takes"
            )
        return model
    config = replace(config, model_name_or_path=None if model is None else name_of(model))
    return load_models(model_names(config), config)[0]


def _with_objects(settings: Mapping[str, Any], objects: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with what was given as arguments. UserError for what is given as both."""
    given = {name: value for name, value in objects.items() if value is not None}
    if twice := sorted(given.keys() & settings.keys()):
        raise UserError(f"{twice[0]} is given twice; leave one out")
    return {**settings, **given}


def _config(
    config_class: type[Config], objects: Mapping[str, Any], complete: Any, settings: Mapping[str, Any]
) -> Config:
    """The checked settings of a run; what was handed over as objects lies in its data cache."""
    values = _with_objects(settings, objects)
    values = {
        name: value if name in OBJECTS else converted(config_class, name, value)
        for name, value in own_names(config_class, values).items()
    }
    cache = _cache_of(values)
    needed = _records_needed(config_class, values) if values.get("max_steps") else None
    for name in ("train_data", "eval_data"):
        if values.get(name) is not None:
            values[name] = data_as_source(values[name], name, cache, needed=needed)
    for name in ("model_name_or_path", "ref_model_name_or_path"):
        if values.get(name) is not None:
            values[name] = model_as_folder(values[name], cache)
    if is_adapter(values.get("model_name_or_path") or "") and not values.get("adapter_name_or_path"):
        values["adapter_name_or_path"] = values.pop("model_name_or_path")  # a model that is an adapter on its base
    # as from YAML: a number may come as text, and a type that fits none is told by name
    return make_config(config_class, complete(own_settings(config_class, values)))


def _cache_of(values: Mapping[str, Any]) -> Path:
    """Where a run with these settings keeps its data."""
    if values.get("data_cache_dir"):
        return Path(values["data_cache_dir"])
    return (Path(values["output_dir"]).parent if values.get("output_dir") else Path("outputs")) / "data_cache"


def _records_needed(config_class: type, values: Mapping[str, Any]) -> int:
    """Records that ``max_steps`` steps read of a stream, for one process of each device."""

    def of(name: str) -> int:
        default: Any = field_of(config_class, name).default
        return int(values.get(name, default))

    per_step = of("per_device_train_batch_size") * of("gradient_accumulation_steps")
    return of("max_steps") * per_step * int(os.environ.get("WORLD_SIZE", 1))


def _checked(config_class: type, settings: Mapping[str, Any]) -> Mapping[str, Any]:
    """UserError for a name that is no setting, with the nearest that is one."""
    known = [item.name for item in fields(config_class)]
    for name in settings:
        if name not in known:
            near = nearest(name, known)
            raise UserError(f"{name} is no setting{f'; is {near} meant?' if near else ', see docs/python.md'}")
    return settings
