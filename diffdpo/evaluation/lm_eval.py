"""A masked diffusion model for lm-evaluation-harness: ``--model diffdpo``.

A continuation's log-likelihood is the estimate of its any-order ELBO, a lower bound: the context is never masked, no
terminator is added, one token takes one forward and is exact. Noise follows from the question (the harness's document,
else the context) and ``seed``, so a result does not depend on batch, order or ranks, and the choices of one question
share their noise: what they have in common cancels where they are compared.
"""

import difflib
import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import groupby
from typing import Any

import torch
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from tqdm import tqdm

from data_pipeline.encode import QUIET, beginning_of
from diffdpo.engine.world import init_distributed
from diffdpo.errors import UserError
from diffdpo.evaluation.score_answers import NamedAnswer, Score, score_answers
from diffdpo.evaluation.score_models import device_named
from diffdpo.models.architecture.published_config import context_of
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.load import load_model
from diffdpo.noise.estimators import SAMPLER_ORDER, check_estimator
from diffdpo.noise.options import NoiseOptions
from diffdpo.sampling.decode import Decoding, option_of, sample
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.segments import Segments
from diffdpo.settings.base import of_kind
from diffdpo.settings.noise import NoiseSettings

log = logging.getLogger(__name__)
ESTIMATED = "estimate of the any-order ELBO, a lower bound; exact for short continuations"
ORDERED = "exact, of the sampler that reveals one token at a time, the surest first"
CONTEXT = 2048  # tokens, of a model that does not say how many it was made for
READ = {"until", "max_gen_toks", "do_sample", "temperature"}
"""What is read of a task's generation settings."""
NEW_TOKENS = 256  # of an answer where a task names no number, as elsewhere in the harness


@dataclass
class NoiseErrors:
    """Standard errors of the log-likelihoods that were estimated, for the harness's record of the model."""

    total: float = 0.0
    largest: float = 0.0
    known: int = 0
    exact: int = 0

    def add(self, score: Score) -> None:
        """Count one."""
        if score.stderr == 0:
            self.exact += 1
        elif score.stderr is not None:
            self.total, self.known = self.total + score.stderr, self.known + 1
            self.largest = max(self.largest, score.stderr)


@register_model("diffdpo")
class DiffusionLM(TemplateLM):
    """``--model_args pretrained=DIR,num_mc_samples=16,...``.

    ``pretrained``: folder, hub name or adapter (default: the bundled model). ``num_mc_samples``, ``score_estimator``,
    ``seed``: of scores. ``steps``, ``block_length``, ``threshold``, ``cfg_scale``, ``remasking``, ``on_eos``: of
    sampled answers (docs/evaluation.md). ``greedy``: also tell whether a continuation is what the sampler would write
    at temperature 0, which tasks such as LAMBADA count; it takes a forward a token, so without it the answer is no.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        *,
        num_mc_samples: int = 16,
        score_estimator: str = "auto",
        seed: int = 0,
        batch_size: int | str | None = 8,
        max_batch_size: int | None = None,
        max_length: int | None = None,
        device: str | None = None,
        dtype: str = "float32",
        load_in_4bit: bool = False,
        block_size: int | str | None = None,
        greedy: bool = False,
        segment_rows: int = 64,
        **sampler: Any,
    ):
        super().__init__()
        noise = _noise_settings(score_estimator, num_mc_samples, seed)
        sampler = {name: sampler_option(name, value) for name, value in sampler.items()}
        self.world = init_distributed()
        self._rank, self._world_size = self.world.rank, self.world.size
        if not torch.cuda.is_available():
            device = "cpu"  # the harness's own default is a GPU
        place = str(self.world.device) if self.world.size > 1 else device_named(device or "auto")
        self.name = model_or_bundled(pretrained)
        self.loaded = load_model(
            self.name,
            dtype=dtype,
            device=place,
            load_in_4bit=load_in_4bit,
            block_size=None if block_size is None else of_kind("block_size", block_size, int),
        )
        self.loaded.model.eval()
        self.tokenizer, self.spec, self._device = self.loaded.tokenizer, self.loaded.spec, torch.device(place)
        self.module = MaskedLogProbs(self.loaded.model, self.spec).eval()
        self.noise = NoiseOptions.of(noise, self.spec)
        self.batch_size = (
            int(str(batch_size)) if str(batch_size).isdigit() else 8
        )  # "auto": memory does not grow with it
        context = context_of(self.loaded.model.config)
        self.max_length = of_kind("max_length", max_length, int) if max_length else context or CONTEXT
        self.greedy, self.sampler, self.seed = of_kind("greedy", greedy, bool), sampler, noise.seed
        self.segments = Segments(rows=of_kind("segment_rows", segment_rows, int))
        self.errors, self.cut = NoiseErrors(), 0
        self.passed_over = set[str]()  # settings of tasks that the sampler has no place for, told once

    # ------------------------------------------------------------------------------------------ what it is told

    @property
    def eot_token_id(self) -> int:
        return int(self.spec.terminator_id)

    @property
    def tokenizer_name(self) -> str:
        return self.name.replace("/", "__")

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **kwargs: Any) -> list[int]:
        """Tokens; with what the tokenizer begins a text with, unless told otherwise."""
        special = True if add_special_tokens is None else add_special_tokens
        return list(self.tokenizer(string, add_special_tokens=special, **QUIET)["input_ids"])

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    def get_model_info(self) -> dict[str, Any]:
        """For the harness's results: how numbers were made, and how well they are known."""
        errors = self.errors
        return {
            "model_family": self.spec.name,
            "loglikelihood": ORDERED if self.noise.estimator == SAMPLER_ORDER else ESTIMATED,
            "score_estimator": self.noise.estimator,
            "num_mc_samples": self.noise.num_samples,
            "noise_stderr_mean": errors.total / errors.known if errors.known else 0.0,
            "noise_stderr_max": errors.largest,
            "loglikelihoods_estimated": errors.known,
            "loglikelihoods_exact": errors.exact,
            "contexts_cut": self.cut,
            "sampler": self.sampler,
        }

    # ------------------------------------------------------------------------------------------------ processes

    def all_gather(self, tensor: torch.Tensor) -> torch.Tensor:
        return self.world.all_gather(tensor.reshape(1)) if self.world.size > 1 else tensor

    def gather_object(self, obj: Any, dst: int = 0) -> list[Any] | None:
        found = self.world.all_gather_object(obj)
        return found if self.world.rank == dst else None

    def barrier(self) -> None:
        self.world.barrier()

    # ------------------------------------------------------------------------------------------------- requests

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        answers = [self._answer(request) for request in requests]
        scores = self._scores(answers, "log-likelihoods", disable_tqdm)
        for score in scores:
            self.errors.add(score)
        found = [(score.score, self._is_greedy(answer)) for score, answer in zip(scores, answers, strict=True)]
        for request, result in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, result)
        return found

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """A lower bound of a text's log-likelihood: each window of ``max_length`` tokens by itself is bounded by its
        ELBO, given what the tokenizer begins a text with."""
        log.warning("diffdpo: rolling log-likelihoods are lower bounds (ELBO), perplexities of them upper ones")
        answers, owner = list[NamedAnswer](), list[int]()
        for number, request in enumerate(requests):
            for window in self._windows(request):
                answers.append(window)
                owner.append(number)
        totals = [0.0] * len(requests)
        for number, score in zip(owner, self._scores(answers, "rolling log-likelihoods", disable_tqdm), strict=True):
            self.errors.add(score)
            totals[number] += score.score
        return totals

    def _loglikelihood_tokens(self, requests: list[Any], **kwargs: Any) -> list[tuple[float, bool]]:
        raise NotImplementedError("loglikelihood needs the whole request: its noise follows from the question")

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        texts: list[str] = []
        bar = tqdm(total=len(requests), desc="answers", disable=disable_tqdm or not self.world.is_main)
        for start in range(0, len(requests), self.batch_size):
            for settings, part in _alike(requests[start : start + self.batch_size]):
                texts += self._answers(part, json.loads(settings))
                bar.update(len(part))
        bar.close()
        for request, text in zip(requests, texts, strict=True):
            self.cache_hook.add_partial("generate_until", request.args, text)
        return texts

    # --------------------------------------------------------------------------------------------------- pieces

    def _answer(self, request: Instance) -> NamedAnswer:
        context, continuation = request.args
        if context:
            prompt, answer = self._encode_pair(context, continuation)
        else:
            prompt, answer = self._beginning(), self.tok_encode(continuation, add_special_tokens=False)
        room = self.max_length - len(answer)
        if room < len(prompt):
            self.cut += 1
            prompt = prompt[len(prompt) - max(0, room) :] if room > 0 else []
        return NamedAnswer(_question(request), [*prompt, *answer], len(prompt))

    def _beginning(self) -> list[int]:
        """What stands before a text without context: BOS where there is one; one token at least where logits are
        shifted, as position 0 is then never predicted."""
        begin = list(beginning_of(self.tokenizer))
        return begin or ([self.eot_token_id] if self.spec.logit_shift else [])

    def _windows(self, request: Instance) -> Iterator[NamedAnswer]:
        (text,) = request.args
        begin, ids = self._beginning(), self.tok_encode(text, add_special_tokens=False)
        size = max(1, self.max_length - len(begin))
        for number, start in enumerate(range(0, len(ids), size)):
            yield NamedAnswer(f"{_digest(text)}/{number}", [*begin, *ids[start : start + size]], len(begin))

    def _scores(self, answers: Sequence[NamedAnswer], title: str, quiet: bool) -> list[Score]:
        """In order; made longest first, so that those of a batch are alike."""
        empty = {i for i, answer in enumerate(answers) if len(answer.ids) == answer.prompt_length}
        order = sorted(set(range(len(answers))) - empty, key=lambda i: -len(answers[i].ids))
        found = dict.fromkeys(empty, Score(0.0, 0.0))
        bar = tqdm(total=len(order), desc=title, disable=quiet or not self.world.is_main)
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            chosen = [answers[i] for i in part]
            scores = score_answers(
                self.module, chosen, self.noise, device=torch.device(self._device), segments=self.segments
            )
            found.update(zip(part, scores, strict=True))
            bar.update(len(part))
        bar.close()
        return [found[i] for i in range(len(answers))]

    def _is_greedy(self, answer: NamedAnswer) -> bool:
        if not self.greedy:
            return False
        prompt, wanted = list(answer.ids[: answer.prompt_length]), list(answer.ids[answer.prompt_length :])
        length = len(wanted)
        options: dict[str, Any] = {"gen_length": length, "steps": length} | (
            {} if self.spec.block_size else {"block_length": length}
        )
        return sample(self.loaded.model, self.spec, [prompt], **options)[0] == wanted

    def _answers(self, requests: Sequence[Instance], settings: dict[str, Any]) -> list[str]:
        """Answers to prompts that ask for the same kind of answer, each cut at the first of its stops."""
        if unread := sorted(settings.keys() - READ - self.passed_over):
            self.passed_over |= set(unread)
            log.warning("diffdpo: the sampler has no %s; a task asks for it, and goes on without", ", ".join(unread))
        stops = settings.get("until") or []
        stops = [stops] if isinstance(stops, str) else stops
        length = int(self.sampler.get("gen_length") or settings.get("max_gen_toks") or NEW_TOKENS)
        options = {key: value for key, value in self.sampler.items() if key != "gen_length"}
        block = self.spec.block_size or int(options.get("block_length") or 32)
        length = block * -(-length // block)
        options |= {"gen_length": length, "steps": int(options.get("steps") or length)}
        if not self.spec.block_size:
            options["block_length"] = block
        if settings.get("do_sample", bool(settings.get("temperature"))):
            options["temperature"] = float(settings.get("temperature") or 1.0)
        prompts = [self._that_fits(self.tok_encode(request.args[0]), length) for request in requests]
        seeds = [(self.seed, int(_digest(request.args[0]), 16)) for request in requests]
        answers = sample(self.loaded.model, self.spec, prompts, seed=seeds, **options)
        return [_until(str(self.tokenizer.decode(ids, skip_special_tokens=True)), stops) for ids in answers]

    def _that_fits(self, prompt: list[int], gen_length: int) -> list[int]:
        room = self.max_length - gen_length
        if room <= 0:
            raise ValueError(f"gen_length {gen_length} leaves no room for a prompt in {self.max_length} tokens")
        self.cut += len(prompt) > room
        return prompt[-room:]


def _noise_settings(score_estimator: str, num_mc_samples: Any, seed: Any) -> NoiseSettings:
    """The settings of the scores; UserError for what can be none, before a model is read."""
    numbers = {"num_mc_samples": of_kind("num_mc_samples", num_mc_samples, int), "seed": of_kind("seed", seed, int)}
    settings = NoiseSettings(score_estimator=score_estimator, **numbers)
    check_estimator(score_estimator, num_samples=settings.num_mc_samples, num_diffusion_steps=None, trains=False)
    return settings


def sampler_option(name: str, value: Any) -> Any:
    """A setting of the sampler that ``--model_args`` holds. UserError for a name that nothing reads, which the harness
    would show in its results as if it had been used."""
    known = [field.name for field in fields(Decoding)]
    if name not in known:
        taken = [word for word in inspect.signature(DiffusionLM.__init__).parameters if word not in ("self", "sampler")]
        near = difflib.get_close_matches(name, [*taken, *known], n=1)
        meant = f" (is {near[0]} meant?)" if near else ""
        raise UserError(f"--model_args: there is no {name}{meant}; allowed: {', '.join([*taken, *known])}")
    return option_of(name, value)


def _question(request: Instance) -> str:
    """What the choices of one question have in common: its document, else the context."""
    if not request.doc:
        return _digest(request.args[0])
    return _digest(json.dumps(request.doc, sort_keys=True, default=str))


def _digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=7).hexdigest()


def _alike(requests: Sequence[Instance]) -> Iterator[tuple[str, list[Instance]]]:
    """(settings as JSON, neighbours that ask for an answer of this kind)."""
    for settings, part in groupby(requests, key=lambda request: json.dumps(request.args[1], sort_keys=True)):
        yield settings, list(part)


def _until(text: str, stops: Sequence[str]) -> str:
    for stop in stops:
        if stop:
            text = text.split(stop)[0]
    return text
