"""Models on tasks outside training: what ``launch/evaluate.py`` runs."""

import hashlib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data_pipeline.names import source_names
from diffdpo import __version__
from diffdpo.config import EvaluateConfig
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.evaluation.head_to_head import head_to_head
from diffdpo.evaluation.report import write_json
from diffdpo.evaluation.score_models import device_named
from diffdpo.evaluation.suite import run_task
from diffdpo.evaluation.tasks.base import Line, Subject, Task
from diffdpo.evaluation.tasks.exact_match import ExactMatch
from diffdpo.evaluation.tasks.make import make_tasks
from diffdpo.memory.exhausted import told_if_exhausted
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.load import LoadedModel, load_model, load_tokenizer_and_spec
from diffdpo.reference.identity import tokenizer_digest, weights_digest
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.settings.base import changed, public
from diffdpo.settings.tasks import PAIRS, task_names
from diffdpo.tracking.evaluation import log_evaluation
from diffdpo.training.checkpoint_model import (
    base_of_checkpoint,
    checkpoint_digest,
    is_checkpoint,
    is_run,
    load_checkpoint,
    models_of_run,
)

ENCODING = ("max_length", "max_prompt_length", "truncation", "answer_truncation", "template", "dtype", "load_in_4bit")
"""Settings that a line depends on beside those of its task."""


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

    def digest(self) -> str:
        """16 hex digits of its weights."""
        if not is_checkpoint(self.name):
            return weights_digest(self.name)
        both = f"{weights_digest(base_of_checkpoint(self.name))} {checkpoint_digest(self.name)}"
        return hashlib.blake2b(both.encode(), digest_size=8).hexdigest()

    def load(self, config: EvaluateConfig, device: str) -> LoadedModel:
        """In eval mode, on the device."""
        options: dict[str, Any] = {"dtype": config.dtype, "device": device, "load_in_4bit": config.load_in_4bit}
        loaded = load_checkpoint(self.name, **options) if is_checkpoint(self.name) else load_model(self.name, **options)
        loaded.model.eval()
        return loaded


def evaluate(config: EvaluateConfig, world: World, *, given: LoadedModel | None = None) -> dict[str, Any]:
    """Every model on every task; the report, on every process. Every process calls.

    ``given``: a model in memory, in the place of the one that is named. UserError or DataError for what a user can
    mend; no weights are read before all names, sources and tokenizers have been looked at.
    """
    candidates = candidates_of(config)
    if given is None:
        check_candidates(candidates, config.ref_model_name_or_path)
    device = str(world.device) if world.size > 1 else device_named(config.device)
    reference = _reference(config, device)
    results, tasks = list[dict[str, Any]](), list[Task]()
    values: list[dict[str, float]] = []
    for candidate in candidates:
        loaded = given or candidate.load(config, device)
        tasks = tasks or _tasks(config, loaded, world)
        subject = _subject(loaded, reference, device)
        settings = _settings_of(config, candidate, given)
        for task, label in zip(tasks, task_labels(tasks), strict=True):
            lines = _run(task, label, subject, world, config, settings, candidate)
            results.append(_result(candidate, task, label, lines))
            values.append(task.values(lines))
    report = {
        "diffdpo": __version__,
        "settings": changed(config),
        "results": results,
        "comparisons": _comparisons(results, values, len(tasks)),
    }
    if world.is_main and config.output:
        write_json(Path(config.output), report)
    if world.is_main and config.tracking_uri not in (None, "none"):
        log_evaluation(report, public(config))
    world.barrier()
    return report


# ------------------------------------------------------------------------------------------------------- models


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


def check_candidates(candidates: Sequence[Candidate], reference: str | None) -> None:
    """UserError for a model without config or tokenizer, and for two that read text in different tokens."""
    names = [each.tokenizer_of for each in candidates] + ([reference] if reference else [])
    tokenizers = [load_tokenizer_and_spec(name)[0] for name in names]
    for name, tokenizer in zip(names[1:], tokenizers[1:], strict=True):
        if tokenizer_digest(tokenizer) != tokenizer_digest(tokenizers[0]):
            raise UserError(
                f"{name} reads text in other tokens than {names[0]}: scores are sums over tokens, so they do not "
                "compare; evaluate the two by themselves"
            )


def _reference(config: EvaluateConfig, device: str) -> MaskedLogProbs | None:
    if not config.ref_model_name_or_path:
        return None
    loaded = load_model(config.ref_model_name_or_path, dtype=config.dtype, device=device)
    return MaskedLogProbs(loaded.model, loaded.spec).eval()


def _subject(loaded: LoadedModel, reference: MaskedLogProbs | None, device: str) -> Subject:
    return Subject(loaded, MaskedLogProbs(loaded.model, loaded.spec).eval(), torch.device(device), reference)


# -------------------------------------------------------------------------------------------------------- tasks


def _tasks(config: EvaluateConfig, loaded: LoadedModel, world: World) -> list[Task]:
    names = task_names(config.task or PAIRS, flag="--task")
    if config.sampler_grid and not any(name.is_sampled for name in names):
        raise UserError("--sampler_grid is of tasks that sample answers, and none is asked for; see --task")
    tasks = make_tasks(names, config, loaded)
    for task in tasks if world.is_main else ():
        for reason in task.left_out[:3]:
            print(f"{task.name}: left out {reason}", file=sys.stderr)
        if len(task.left_out) > 3:
            print(f"{task.name}: left out {len(task.left_out)} in all", file=sys.stderr)
    return tasks


def _run(
    task: Task,
    label: str,
    subject: Subject,
    world: World,
    config: EvaluateConfig,
    settings: Mapping[str, Any],
    candidate: Candidate,
) -> list[Line]:
    own = {**settings, **task.identity()}
    title = f"{candidate.label}, {label}"
    with told_if_exhausted(f"in {task.name}", "give a smaller --batch_size or --segment_rows"):
        return run_task(
            task,
            subject,
            world,
            path=_items_path(config.output, candidate, task, own),
            settings=own,
            batch_size=config.batch_size,
            title=title,
        )


def _items_path(output: str | None, candidate: Candidate, task: Task, settings: Mapping[str, Any]) -> Path | None:
    """A file for each model, task and way of doing it: other settings never meet what was written before."""
    if output is None:
        return None
    folder = Path(output).with_suffix(".items")
    folder.mkdir(exist_ok=True)
    text = json.dumps(settings, sort_keys=True, default=str)
    digest = hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
    name = re.sub(r"[^\w.-]+", "_", f"{candidate.label}.{task.name}")[:80]
    return folder / f"{name}.{digest}.jsonl"


def _settings_of(config: EvaluateConfig, candidate: Candidate, given: LoadedModel | None) -> dict[str, Any]:
    shared = {name: getattr(config, name) for name in ENCODING}
    if given is not None or not config.output:  # nothing is kept that could be taken for another's
        return shared
    reference = config.ref_model_name_or_path
    return shared | {
        "model_weights": candidate.digest(),
        "reference_weights": weights_digest(reference) if reference else None,
    }


def task_labels(tasks: Sequence[Task]) -> list[str]:
    """The tasks' names; of those done in several ways, with what differs in how answers are sampled."""
    labels = []
    sampled = [task for task in tasks if isinstance(task, ExactMatch)]
    for task in tasks:
        alike = [each.sampler for each in sampled if each.name == task.name]
        own: dict[str, Any] = task.sampler if isinstance(task, ExactMatch) else {}
        differing = [f"{name} {value}" for name, value in own.items() if any(each[name] != value for each in alike)]
        labels.append(f"{task.name} ({', '.join(differing)})" if differing else task.name)
    return labels


def _result(candidate: Candidate, task: Task, label: str, lines: Sequence[Line]) -> dict[str, Any]:
    return {
        "model": candidate.name,
        "label": candidate.label,
        "run": candidate.run,
        "step": candidate.step,
        "task": task.name,
        "task_label": label,
        "items": len(lines),
        "left_out": len(task.left_out),
        **task.identity(),
        "figures": task.figures(lines),
    }


def _comparisons(
    results: Sequence[Mapping[str, Any]], values: Sequence[Mapping[str, float]], tasks: int
) -> list[dict[str, Any]]:
    """Each model against the first, task by task; and the ways of sampling of one model against its first."""
    found = []
    for number, result in enumerate(results):
        first = number % tasks if tasks else 0
        if number >= tasks:
            found.append(_against(results, values, number, first))
        else:
            same = next(i for i in range(number + 1) if results[i]["task"] == result["task"])
            if same != number and "sampler" in result and results[same]["sampler"] != result["sampler"]:
                found.append(_against(results, values, number, same))
    return found


def _against(
    results: Sequence[Mapping[str, Any]], values: Sequence[Mapping[str, float]], number: int, first: int
) -> dict[str, Any]:
    result, other = results[number], results[first]
    return {
        "label": result["label"],
        "against": other["label"] if other["label"] != result["label"] else other["task_label"],
        "task": result["task"],
        "task_label": result["task_label"],
        **head_to_head(values[first], values[number]),
    }
