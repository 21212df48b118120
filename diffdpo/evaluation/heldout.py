"""All that is measured on held-out data, before, during and after training."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from data_pipeline.batch import PairBatch
from diffdpo.config import RunConfig
from diffdpo.engine.base import Engine
from diffdpo.errors import UserError
from diffdpo.evaluation.answers import answer_length, distinct, exact_match, problems_of
from diffdpo.evaluation.items import problem_names, record_names
from diffdpo.evaluation.preferences import answer_losses, score_held_out
from diffdpo.evaluation.result import Evaluation
from diffdpo.losses.options import LossOptions
from diffdpo.memory.exhausted import told_if_exhausted
from diffdpo.models.load import LoadedModel
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.reference import Reference, remembered
from diffdpo.scores.segments import Segments

SAMPLING_TEMPERATURE = 1.0  # answers are drawn from the model's distribution, not its mode
SAMPLING_SEED = 0


class SampledAnswers:
    """Held-out problems, answered by sampling and judged. No problems where the task is ``none``.

    UserError when a task is asked for and there is nothing that it could judge.
    """

    def __init__(self, config: RunConfig, engine: Engine, loaded: LoadedModel, batches: Sequence[PairBatch]):
        self.engine, self.loaded = engine, loaded
        self.on_sampled: Callable[[str, list[dict[str, Any]]], None] = lambda when, samples: None  # on rank 0
        self.task = config.eval_task
        if self.task == "auto":
            self.task = "none" if config.train_data else "arithmetic"
        self.problems = []
        if batches and config.num_eval_problems and self.task != "none":
            everyone = engine.world.all_gather_object(problems_of(batches, loaded.tokenizer, self.task))
            # sorted: the same problems, with the same noise, for every batch and number of ranks
            self.problems = distinct([problem for part in everyone for problem in part])[: config.num_eval_problems]
            self.length = max(engine.world.all_gather_object(answer_length(batches)))
            if not self.problems and config.eval_task != "auto":
                raise UserError(
                    f"--eval_task {self.task}: no chosen answer of the held-out pairs holds a result that it can read; "
                    "use --eval_task none, or a larger --max_length if the answers are cut"
                )

    def exact_match(self, when: str) -> dict[str, list[float]]:
        """1 or 0 for each problem; nothing without problems."""
        if not self.problems:
            return {}
        with told_if_exhausted("while answers are sampled", "give --num_eval_problems 0, or a smaller --max_length"):
            right, texts = exact_match(
                self.loaded.model,
                self.loaded.spec,
                self.loaded.tokenizer,
                self.problems,
                self.task,
                world=self.engine.world,
                shared_forwards=self.engine.choice.shards_parameters,
                gen_length=self.length,
                temperature=SAMPLING_TEMPERATURE,
                seed=SAMPLING_SEED,
                title=f"answers {when}",
            )
        if self.engine.world.is_main:
            self.on_sampled(when, self._samples(texts, right.tolist()))
        return {"exact_match": right.tolist()}

    def names(self) -> list[str]:
        """Of the problems, in the order of the values."""
        return problem_names(self.problems, self.loaded.tokenizer)

    def _samples(self, texts: Sequence[str], right: Sequence[float]) -> list[dict[str, Any]]:
        decode = self.loaded.tokenizer.decode
        return [
            {
                "prompt": decode(list(problem.prompt), skip_special_tokens=True),
                "right_answer": problem.truth,
                "sampled": text,
                "is_right": bool(value),
            }
            for problem, text, value in zip(self.problems, texts, right, strict=True)
        ]


class HeldOutPairs:
    """The held-out batches of this rank, pairs or single answers, with everything needed to judge a policy on them."""

    def __init__(
        self,
        engine: Engine,
        reference: Reference,
        noise: NoiseOptions,
        loss: LossOptions,
        batches: Sequence[PairBatch],
        answers: SampledAnswers,
        *,
        segments: Segments,
        max_length: int,
        moves: bool = False,
    ):
        """``moves``: the reference changes while the policy is trained."""
        self.engine, self.noise, self.loss = engine, noise, loss
        self.reference = reference if moves else remembered(reference, segments)
        self.batches, self.answers = batches, answers
        self.segments, self.max_length = segments, max_length

    def evaluate(self, when: str) -> Evaluation:
        """Pairs and sampled answers."""
        return Evaluation(self._values() | self.answers.exact_match(when))

    def quick(self) -> dict[str, float]:
        """Means over the pairs: what is cheap enough to measure during training."""
        return Evaluation(self._values()).means()

    def names(self) -> Mapping[str, list[str]]:
        """The items of an evaluation, in the order of its values. Every rank calls."""
        counts = [batch.weight_B2.amax(1) for batch in self.batches]
        records = record_names(self.batches, counts, self.engine.world)
        return {"records": records, "problems": self.answers.names()}

    def _values(self) -> dict[str, list[float]]:
        if not self.batches:
            return {}
        table = score_held_out(
            self.engine,
            self.reference,
            self.batches,
            self.noise,
            self.loss,
            segments=self.segments,
            max_length=self.max_length,
        )
        return table.values(self.loss)


class HeldOutAnswers:
    """The same for supervised training: the loss of right answers, and sampled ones."""

    def __init__(
        self,
        engine: Engine,
        noise: NoiseOptions,
        batches: Sequence[PairBatch],
        answers: SampledAnswers,
        *,
        segments: Segments,
    ):
        self.engine, self.noise, self.batches = engine, noise, batches
        self.answers, self.segments = answers, segments

    def evaluate(self, when: str) -> Evaluation:
        """Losses and sampled answers."""
        return Evaluation(self._values() | self.answers.exact_match(when))

    def quick(self) -> dict[str, float]:
        """Mean loss, and exact match: supervised runs are long, so this too can be afforded."""
        return Evaluation(self._values() | self.answers.exact_match("so far")).means()

    def names(self) -> Mapping[str, list[str]]:
        """The items of an evaluation, in the order of its values. Every rank calls."""
        counts = [batch.weight_B2[:, 0] for batch in self.batches]
        records = record_names(self.batches, counts, self.engine.world)
        return {"records": records, "problems": self.answers.names()}

    def _values(self) -> dict[str, list[float]]:
        if not self.batches:
            return {}
        losses = answer_losses(self.engine, self.batches, self.noise, segments=self.segments)
        return {"loss": losses}
