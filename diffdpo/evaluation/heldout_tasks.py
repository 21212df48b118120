"""Tasks inside training: those of ``diffdpo evaluate``, on held-out records or on files of their own."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

from data_pipeline.batch import PairBatch
from data_pipeline.encode import Encoder
from data_pipeline.records import Record
from data_pipeline.sources.choices import question_of
from data_pipeline.sources.read import questions_in, records_in
from data_pipeline.verifiers import find_verifier
from diffdpo.config import RunConfig
from diffdpo.engine.base import Engine
from diffdpo.errors import UserError
from diffdpo.evaluation.items import problem_names
from diffdpo.evaluation.suite import run_task
from diffdpo.evaluation.tasks.base import Line, Subject, Task
from diffdpo.evaluation.tasks.exact_match import ExactMatch
from diffdpo.evaluation.tasks.multiple_choice import MultipleChoice
from diffdpo.evaluation.tasks.problems import distinct, problems_of
from diffdpo.memory.exhausted import told_if_exhausted
from diffdpo.models.load import LoadedModel
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.segments import Segments
from diffdpo.settings.evaluation import AUTO, NONE, metric_of_task, training_tasks
from diffdpo.settings.tasks import MULTIPLE_CHOICE, TaskName

SAMPLING_TEMPERATURE = 1.0  # answers are drawn from the model's distribution, not its mode
BLOCK_LENGTH = 16
BATCH_SIZE = 50  # prompts sampled together
SAMPLES = 16  # forwards a score of a choice, where a run has fewer: a choice is one bit of a noisy difference


class HeldOutTasks:
    """The tasks of ``--eval_task``: by name their values, one an item, in an order that the items alone decide.

    UserError when a task is asked for and there is nothing that it could judge. ``decide``: whether a metric of theirs
    says which model is the best, so that they are measured between steps as well.
    """

    def __init__(
        self,
        config: RunConfig,
        engine: Engine,
        loaded: LoadedModel,
        encoder: Encoder,
        *,
        records: Sequence[Record],
        batches: Sequence[PairBatch],
        segments: Segments,
    ):
        self.config, self.engine, self.encoder, self.segments = config, engine, encoder, segments
        self.subject = Subject(loaded, engine, engine.world.device)
        self.on_sampled: Callable[[str, list[dict[str, Any]]], None] = lambda when, samples: None  # on rank 0
        self.names = training_tasks(config.eval_task, generated=config.train_data is None)
        self.length = max(engine.world.all_gather_object(_answer_length(batches)))
        self.tasks: dict[str, Task] = {}
        for name in self.names if config.num_eval_problems else ():
            if name.source or records:
                self.tasks[metric_of_task(name, self.names)] = self._task(name, records)
        self.decide = config.best_metric in self.tasks

    @property
    def task(self) -> str:
        """The tasks by name, as ``--eval_task`` takes them."""
        return ",".join(f"{name.kind}@{name.source}" if name.source else name.kind for name in self.names) or NONE

    def fewer(self) -> list[str]:
        """A sentence for each task that has fewer problems than were asked for; nothing where there are enough."""
        asked, limit = self.config.num_eval_problems, self.config.max_eval_pairs
        sentences = []
        for name in self.names if self.tasks else ():
            metric = metric_of_task(name, self.names)
            if (count := len(self.tasks[metric].keys)) >= asked:
                continue
            where = name.source or "the held-out records" + (
                f", of which --max_eval_pairs takes {limit}" if limit else ""
            )
            sentences.append(f"{metric}: {count} problems, not the {asked} of --num_eval_problems: no more in {where}")
        return sentences

    def values(self, when: str) -> dict[str, list[float]]:
        """A value of each item by metric; nothing without tasks."""
        world = self.engine.world
        if self.engine.choice.meets_in_forwards:  # every forward takes all ranks, so all do the same ones
            world = replace(world, rank=0, size=1)
        found = {}
        for metric, task in self.tasks.items():
            with told_if_exhausted("in the held-out tasks", "give --num_eval_problems 0, or a smaller --max_length"):
                lines = run_task(
                    task,
                    self.subject,
                    world,
                    path=None,
                    settings={},
                    batch_size=BATCH_SIZE if isinstance(task, ExactMatch) else 8,
                    title=f"{task.name} {when}",
                    shown=self.engine.world.is_main,
                )
            found[metric] = list(task.values(lines).values())
            if isinstance(task, ExactMatch) and self.engine.world.is_main:
                self.on_sampled(when, self._samples(metric, task, lines))
        return found

    def items(self) -> dict[str, list[str]]:
        """By metric the names of what was asked, in the order of the values; equal in all runs that ask the same."""
        tokenizer = self.subject.loaded.tokenizer
        return {
            metric: problem_names(task.problems, tokenizer)
            if isinstance(task, ExactMatch)
            else [key.digest for key in task.keys]
            for metric, task in self.tasks.items()
        }

    def _samples(self, metric: str, task: ExactMatch, lines: Sequence[Line]) -> list[dict[str, Any]]:
        """What was sampled, for people to read."""
        decode = self.subject.loaded.tokenizer.decode
        return [
            {
                "task": metric,
                "prompt": decode(list(problem.ids), skip_special_tokens=True),
                "right_answer": line["truth"],
                "sampled": line["answer"],
                "is_right": bool(line["right"]),
            }
            for problem, line in zip(task.problems, lines, strict=True)
        ]

    def _task(self, name: TaskName, records: Sequence[Record]) -> Task:
        task = self._choices(name, records) if name.kind == MULTIPLE_CHOICE else self._sampled(name, records)
        if not task.keys and self.config.eval_task != AUTO:
            what = f"the records of {name.source}" if name.source else "the held-out records"
            raise UserError(
                f"--eval_task {name.kind}: none of {what} has what it needs"
                + (f" (the first: {task.left_out[0]})" if task.left_out else "")
                + "; use --eval_task none, or a larger --max_length if the answers are cut"
            )
        return task

    def _choices(self, name: TaskName, records: Sequence[Record]) -> Task:
        source = questions_in(name.source, flag="--eval_task") if name.source else map(question_of, records)
        first = islice(source, self.config.num_eval_problems)
        questions = {each.id: each for each in first if each is not None}.values()
        noise = NoiseOptions.of(self.config, self.subject.loaded.spec)
        noise = replace(noise, num_samples=max(SAMPLES, noise.num_samples))
        return MultipleChoice(questions, self.encoder, noise, segments=self.segments)

    def _sampled(self, name: TaskName, records: Sequence[Record]) -> Task:
        verifier, left_out = find_verifier(name.kind), list[str]()
        source = list(records_in(name.source, flag="--eval_task")) if name.source else records
        numbered = problems_of(source, self.encoder, verifier, left_out)
        # sorted: the same problems, with the same noise, for every batch and number of ranks
        ordered = [problem for _, problem in sorted(numbered, key=lambda each: (each[1].ids, each[0]))]
        problems = distinct(ordered)[: self.config.num_eval_problems]
        block = self.subject.loaded.spec.block_size or BLOCK_LENGTH
        sampler = {"block_length": block, "temperature": SAMPLING_TEMPERATURE}
        if not name.source:
            sampler["gen_length"] = self.length
        return ExactMatch(
            name.kind,
            problems,
            verifier,
            sampler,
            noise=[(number,) for number in range(len(problems))],
            left_out=left_out,
        )


def _answer_length(batches: Sequence[PairBatch]) -> int:
    """A length for sampled answers: the longest of the pairs', rounded up to whole blocks."""
    longest = max((int((batch.lengths_B2 - batch.prompt_lengths_B2).max()) for batch in batches), default=1)
    return BLOCK_LENGTH * -(-longest // BLOCK_LENGTH)
