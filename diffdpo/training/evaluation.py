"""Models on tasks outside training: what ``launch/evaluate.py`` runs."""

import hashlib
import json
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from diffdpo import __version__
from diffdpo.config import EvaluateConfig
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.evaluation.head_to_head import head_to_head
from diffdpo.evaluation.report import write_json
from diffdpo.evaluation.score_models import device_beside
from diffdpo.evaluation.suite import run_task
from diffdpo.evaluation.tasks.base import Line, Subject, Task
from diffdpo.evaluation.tasks.exact_match import ExactMatch
from diffdpo.evaluation.tasks.make import make_tasks
from diffdpo.memory.exhausted import told_if_exhausted
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.noise.estimators import check_estimator
from diffdpo.reference.identity import weights_digest
from diffdpo.sampling.decode import DEFAULT_BLOCK, Decoding
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.settings.base import changed, public
from diffdpo.settings.sampling import samplers
from diffdpo.settings.tasks import PAIRS, task_names
from diffdpo.tracking.evaluation import log_evaluation
from diffdpo.tracking.mlflow_run import check_tracking_uri
from diffdpo.training.candidates import IN_MEMORY, Candidate, candidates_of, check_candidates

ENCODING = ("max_length", "max_prompt_length", "truncation", "answer_truncation", "template", "dtype", "load_in_4bit")
"""Settings that a line depends on beside those of its task."""


def evaluate(config: EvaluateConfig, world: World, *, given: LoadedModel | None = None) -> dict[str, Any]:
    """Every model on every task; the report, on every process. Every process calls.

    ``given``: a model in memory, in the place of the one that is named. UserError or DataError for what a user can
    mend; no weights are read before all names, sources and tokenizers have been looked at.
    """
    check_before_weights(config)
    candidates = candidates_of(config) if given is None else [Candidate(IN_MEMORY, IN_MEMORY, IN_MEMORY)]
    if given is None:
        check_candidates(candidates, config.ref_model_name_or_path, block_size=config.block_size)
    device = device_beside(str(world.device) if world.size > 1 else config.device, [given] if given else [])
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
        try:
            log_evaluation(report, public(config))
        except UserError as error:  # what was evaluated must not be lost for it
            print(f"warning: {error}", file=sys.stderr)
    world.barrier()
    return report


def check_before_weights(config: EvaluateConfig) -> None:
    """UserError for an estimator or a sampler that cannot be, a store that is none, and an output that would overwrite
    something."""
    check_estimator(
        config.score_estimator,
        num_samples=config.num_mc_samples,
        num_diffusion_steps=config.num_diffusion_steps,
        trains=False,
    )
    for sampler in samplers(config):
        length = sampler["gen_length"] or sampler["block_length"] or DEFAULT_BLOCK
        Decoding(**{**sampler, "gen_length": length, "steps": (sampler["gen_length"] and sampler["steps"]) or length})
    if config.tracking_uri not in (None, "none"):
        check_tracking_uri(config.tracking_uri)
    if config.output and (path := Path(config.output)).exists():
        try:
            ours = "comparisons" in json.loads(path.read_text())
        except (OSError, ValueError, TypeError):
            ours = False
        if not ours:
            raise UserError(f"--output {path} exists and is no report of this command; name another file")


def _reference(config: EvaluateConfig, device: str) -> MaskedLogProbs | None:
    if not config.ref_model_name_or_path:
        return None
    options: Any = {"dtype": config.dtype, "device": device, "block_size": config.block_size}
    loaded = load_model(config.ref_model_name_or_path, **options)
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
    shared |= {} if config.block_size is None else {"block_size": config.block_size}
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
