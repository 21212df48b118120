"""Shared by the benchmarks of scores: two models that differ, pairs of a wanted length, many draws of their scores.

Shape suffixes: D draws, 2 sides (0 chosen, 1 rejected).
"""

import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import numpy as np
import torch

from data_pipeline.batch import collate
from data_pipeline.encode import TokenAnswer, TokenPair
from data_pipeline.generate import generate_pairs
from data_pipeline.sources.files import SourceOptions, open_rows
from data_pipeline.sources.formats import convert
from diffdpo.losses.preference import preference_loss
from diffdpo.models.bundled import BUNDLED_MODEL
from diffdpo.models.load import load_model
from diffdpo.noise.estimators import draw_plan
from diffdpo.noise.plan import NoiseKey, NoisePlan
from diffdpo.noise.rows import NoisyRows, alike, noisy_rows, rows_of_plans
from diffdpo.scores.fold import fold
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rows import forward_rows, score_rows
from diffdpo.scores.segments import Segments


@dataclass(frozen=True)
class Planner:
    """``plan(length, key)``; ``in_common``: answers that are alike read one stream, as ``balanced`` has it."""

    plan: Callable[[int, NoiseKey], NoisePlan]
    in_common: bool = False


@dataclass(frozen=True)
class Models:
    """Policy and reference, and how text becomes tokens."""

    policy: MaskedLogProbs
    reference: MaskedLogProbs
    encode: Callable[[str], list[int]]
    mask_token_id: int
    terminator_id: int

    @property
    def device(self) -> torch.device:
        return next(self.policy.parameters()).device


def load_models(
    policy: str | None, reference: str | None, *, dpo_steps: int, device: str, seed: int, learning_rate: float = 1e-4
) -> Models:
    """The named models (None: the bundled one). With one model only, the policy is it after ``dpo_steps`` of DPO."""
    first = load_model(reference or policy or str(BUNDLED_MODEL), device=device)
    models = Models(
        MaskedLogProbs(copy.deepcopy(first.model), first.spec),
        MaskedLogProbs(first.model.requires_grad_(False), first.spec),
        lambda text: first.tokenizer(text, add_special_tokens=False)["input_ids"],
        first.spec.mask_token_id,
        first.spec.terminator_id,
    )
    if policy and reference:
        return Models(
            MaskedLogProbs(load_model(policy, device=device).model, first.spec),
            *(models.reference, models.encode, models.mask_token_id, models.terminator_id),
        )
    train(models, steps=dpo_steps, seed=seed, learning_rate=learning_rate)
    return models


def train(
    models: Models,
    *,
    steps: int,
    seed: int,
    learning_rate: float,
    pairs_a_step: int = 8,
    estimator: str = "mask_count_mirror",
    num_samples: int = 2,
) -> None:
    """A little DPO, all parameters, so that policy and reference differ as they do in a run."""
    optimizer = torch.optim.AdamW(models.policy.parameters(), lr=learning_rate, weight_decay=0.0)
    records = natural_pairs(models, seed=seed + 1)
    for step in range(steps):
        pairs = list(islice(records, pairs_a_step))
        batch = collate(pairs, pad_id=0, epoch=0, step=step, micro=0, last_micro=True)
        options = {"estimator": estimator, "num_samples": num_samples, "seed": seed}
        rows = noisy_rows(batch, mask_token_id=models.mask_token_id, **options).to(models.device)
        reference = fold(score_rows(models.reference, rows, segments=Segments()), rows)
        scores = fold(forward_rows(models.policy, rows), rows)
        loss = preference_loss(
            "sigmoid", policy_B2=scores.score_B2, reference_B2=reference.score_B2, tokens_B2=scores.tokens_B2
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.policy.parameters(), 1.0)
        optimizer.step()


def natural_pairs(models: Models, *, seed: int) -> Iterator[TokenPair]:
    """Generated arithmetic pairs as they are, without end."""
    for record in generate_pairs(10**9, seed=seed):
        prompt = models.encode(record["prompt"])
        sides = ([*models.encode(record[side]), models.terminator_id] for side in ("chosen", "rejected"))
        yield TokenPair(record["id"], *(answer(prompt, ids) for ids in sides))


def pairs_of_length(
    models: Models, length: int, *, number: int, seed: int, source: str | None = None
) -> list[TokenPair]:
    """Pairs whose answers have exactly ``length`` tokens, cut if longer.

    From the file ``source``: pairs of different prompts whose answers both have that many. Generated: joined from
    several problems if shorter, which is not what the model was trained on.
    """
    return _read_pairs(models, length, number, source) if source else _joined_pairs(models, length, number, seed)


def _read_pairs(models: Models, length: int, number: int, source: str) -> list[TokenPair]:
    found: dict[str, TokenPair] = {}
    for row in open_rows(source, SourceOptions()):
        for record in convert(row.parsed()):
            prompt, *ids = (models.encode(text) for text in (record.prompt, record.chosen, record.rejected))
            chosen, rejected = ([*answer, models.terminator_id][:length] for answer in ids)
            if min(len(chosen), len(rejected)) == length and chosen != rejected:
                found.setdefault(record.prompt, TokenPair(record.id, answer(prompt, chosen), answer(prompt, rejected)))
        if len(found) == number:
            return list(found.values())
    raise SystemExit(f"{source}: {len(found)} prompts have two answers of at least {length} tokens; {number} wanted")


def _joined_pairs(models: Models, length: int, number: int, seed: int) -> list[TokenPair]:
    records = generate_pairs(10**9, seed=seed, split="eval")
    found: list[TokenPair] = []
    while len(found) < number:
        prompt, chosen, rejected = "", list[int](), list[int]()
        while min(len(chosen), len(rejected)) < length:
            record = next(records)
            prompt += record["prompt"]
            chosen += models.encode(record["chosen"] + "\n")
            rejected += models.encode(record["rejected"] + "\n")
        if chosen[:length] != rejected[:length]:
            ids = models.encode(prompt)
            sides = (answer(ids, tokens[:length]) for tokens in (chosen, rejected))
            found.append(TokenPair(f"L{length}-{len(found)}", *sides))
    return found


def answer(prompt: list[int], ids: list[int]) -> TokenAnswer:
    return TokenAnswer(np.array([*prompt, *ids], dtype=np.int32), len(prompt))


def planner(estimator: str, num_samples: int, **options) -> Planner:
    """Plans of a named estimator."""
    return Planner(
        lambda length, key: draw_plan(estimator, length=length, num_samples=num_samples, key=key, **options),
        in_common=estimator == "balanced",
    )


def drawn_rows(models: Models, pair: TokenPair, planner: Planner, draws: range, *, seed: int) -> NoisyRows:
    """Rows of a pair under each of the draws, as if each draw were a pair of its own."""
    pairs = [TokenPair(str(draw), pair.chosen, pair.rejected) for draw in draws]
    batch = collate(pairs, pad_id=0, epoch=0, step=0, micro=0, last_micro=True)

    chosen_L, rejected_L = (side.ids[side.prompt_length :] for side in (pair.chosen, pair.rejected))
    one_stream = planner.in_common and alike(chosen_L, rejected_L)

    def of(prompt: int, length: int, draw: str, side: int) -> NoisePlan:
        return planner.plan(length, NoiseKey(seed, 0, pair.id, 0 if one_stream else side, int(draw)))

    return rows_of_plans(batch, of, empty_rows=1, mask_token_id=models.mask_token_id).to(models.device)


def drawn_scores(
    models: Models, pair: TokenPair, planner: Planner, draws: range, *, seed: int, segment_rows: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """(policy, reference) scores [D, 2] of a pair under each of the draws, noise shared."""
    rows = drawn_rows(models, pair, planner, draws, seed=seed)
    both = (models.policy, models.reference)
    scores = [fold(score_rows(model, rows, segments=Segments(rows=segment_rows)), rows).score_B2 for model in both]
    return scores[0].double().cpu().numpy(), scores[1].double().cpu().numpy()
