"""From the names of tasks to tasks with items, for the command ``evaluate``."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any, TypeVar

from data_pipeline.encode import Encoder
from data_pipeline.generate import generate_choices, generate_pairs
from data_pipeline.names import source_names
from data_pipeline.records import AnswerRecord, Record, record_from_fields
from data_pipeline.sources.choices import ChoiceRecord
from data_pipeline.sources.read import questions_in, records_in
from data_pipeline.verifiers import find_verifier
from diffdpo.config import EvaluateConfig
from diffdpo.errors import UserError
from diffdpo.evaluation.tasks.base import Task
from diffdpo.evaluation.tasks.exact_match import ExactMatch, with_lengths
from diffdpo.evaluation.tasks.held_out_pairs import HeldOutPairsTask
from diffdpo.evaluation.tasks.multiple_choice import MultipleChoice
from diffdpo.evaluation.tasks.problems import Problem, distinct, problems_of, right_answer
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import LoadedModel
from diffdpo.noise.options import NoiseOptions
from diffdpo.sampling.decode import prompt_obstacle
from diffdpo.scores.segments import Segments
from diffdpo.settings.sampling import samplers
from diffdpo.settings.tasks import GENERATED, MULTIPLE_CHOICE, PERPLEXITY, TaskName

Item = TypeVar("Item", Record, ChoiceRecord)


def make_tasks(names: Sequence[TaskName], config: EvaluateConfig, loaded: LoadedModel) -> list[Task]:
    """A task for each name, and of one that samples one for each cell of the sampler's grid. UserError or DataError
    for one without items."""
    encoder = make_encoder(config, loaded.tokenizer, loaded.spec)
    tasks: list[Task] = []
    for name in names:
        made = _sampled(name, config, loaded, encoder) if name.is_sampled else [_scored(name, config, loaded, encoder)]
        for task in made:
            if not task.keys:
                first = f": {task.left_out[0]}" if task.left_out else ""
                raise UserError(
                    f"{_flag(name)}: none of its {len(task.left_out)} records can be used by {name.kind}{first}"
                )
        tasks += made
    return tasks


def _scored(name: TaskName, config: EvaluateConfig, loaded: LoadedModel, encoder: Encoder) -> Task:
    noise, segments = NoiseOptions.of(config, loaded.spec), Segments(rows=config.segment_rows)
    again: list[str] = []
    task: MultipleChoice | HeldOutPairsTask
    if name.kind == MULTIPLE_CHOICE:
        questions = _limited(_items(name, config, questions_in, _generated_questions), config, again)
        task = MultipleChoice(questions, encoder, noise, segments=segments)
    else:
        records: Iterable[Record] = _limited(_items(name, config, records_in, _generated_pairs), config, again)
        if name.kind == PERPLEXITY:
            records = _right_answers(records)
        task = HeldOutPairsTask(records, encoder, noise, beta=config.beta, segments=segments, name=name.kind)
    task.left_out += again
    return task


def _sampled(name: TaskName, config: EvaluateConfig, loaded: LoadedModel, encoder: Encoder) -> list[Task]:
    verifier, left_out = find_verifier(name.kind), list[str]()
    records = _limited(_items(name, config, records_in, _generated_pairs), config, left_out)
    problems = distinct([problem for _, problem in problems_of(records, encoder, verifier, left_out)])
    size = loaded.spec.block_size
    tasks: list[Task] = []
    for sampler in samplers(config):
        length = with_lengths(sampler, problems, block_size=size)["gen_length"]
        fit, obstacles = _that_fit(problems, loaded, length)
        tasks.append(
            ExactMatch(
                name.kind,
                fit,
                verifier,
                sampler | {"gen_length": length},
                block_size=size,
                seed=config.seed,
                left_out=[*left_out, *obstacles],
            )
        )
    return tasks


def _that_fit(problems: Sequence[Problem], loaded: LoadedModel, gen_length: int) -> tuple[list[Problem], list[str]]:
    """(those that the model's context holds together with an answer, why the others are left out)."""
    reasons = [prompt_obstacle(loaded.model, loaded.spec, problem.ids, gen_length) for problem in problems]
    told = [f"{problem.id}: {why}" for problem, why in zip(problems, reasons, strict=True) if why]
    return [problem for problem, why in zip(problems, reasons, strict=True) if not why], told


def _items(
    name: TaskName,
    config: EvaluateConfig,
    read: Callable[..., Iterator[Item]],
    generated: Callable[[int], Iterator[Item]],
) -> Iterator[Item]:
    """Items of the task's own file, else of --pairs, else generated. Ids of several sources begin with their number."""
    named = name.source or config.pairs
    if named is None:
        if name.kind not in GENERATED:
            raise UserError(f"--task {name.kind} has no items: give --pairs FILE, or --task {name.kind}@FILE")
        yield from generated(config.num_generated)
        return
    sources = [named] if name.source else source_names(named)
    for number, source in enumerate(sources):
        for item in read(source, flag=_flag(name)):
            own = item if len(sources) == 1 else replace(item, id=f"{number}/{item.id}")
            known = len(sources) == 1 or "source" in own.meta
            yield own if known else replace(own, meta={**own.meta, "source": source})


def _flag(name: TaskName) -> str:
    return f"--task {name.kind}@{name.source}" if name.source else "--pairs"


def _limited(items: Iterator[Item], config: EvaluateConfig, left_out: list[str]) -> Iterator[Item]:
    """The first --limit items, each id once."""
    met = set[str]()
    for item in islice(items, config.limit or None):
        if item.id in met:
            left_out.append(f"{item.id}: another record has this id")
        else:
            met.add(item.id)
            yield item


def _right_answers(records: Iterable[Record]) -> Iterator[Record]:
    for record in records:
        answer = right_answer(record)
        if answer is not None:
            yield AnswerRecord(record.id, record.prompt, answer, True, record.meta, record.template_kwargs)


def _generated_pairs(count: int) -> Iterator[Any]:
    yield from map(record_from_fields, generate_pairs(count, seed=0, split="eval"))


def _generated_questions(count: int) -> Iterator[Any]:
    for row in generate_choices(count, seed=0):
        yield ChoiceRecord(row["id"], row["question"], tuple(row["choices"]), row["answer"], row["meta"])
