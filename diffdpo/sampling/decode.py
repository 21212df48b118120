"""Sampling from a masked diffusion model: start from all masks, reveal the surest tokens step by step.

LLaDA's semi-autoregressive procedure (2502.09992): blocks from left to right, inside a block the most confident
predictions stay and the rest are masked again. Options are Dream's orders, classifier-free guidance, a confidence
threshold (as many tokens a step as are sure) and the block cache. The order of steps is that of the published
samplers; what differs is that only masked positions of the current block reach the head, padding is not computed, and
a prompt whose answer has ended leaves the batch. None of the three changes an answer.

Shapes: R rows, T padded length, B block length, M masked positions, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, get_args, get_type_hints

import torch
from torch import Tensor, nn

from diffdpo.errors import UserError
from diffdpo.models.architecture.backbone import MaskedLM, native
from diffdpo.models.architecture.published_config import context_of
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.models.architecture.token_log_probs import DEFAULT_LOGITS_BUDGET
from diffdpo.sampling.canvas import Canvas
from diffdpo.sampling.causal_blocks import CausalBlockPredictor, causal_blocks
from diffdpo.sampling.confidence import ORDERS, choose
from diffdpo.sampling.predict import BlockPredictor
from diffdpo.settings.base import kind_of, of_kind

DEFAULT_BLOCK = 32
ON_EOS = ("allow", "last", "forbid")
BYTES_A_LOGIT = 32
"""Of the logit and of what choosing a token makes of it: in fp64 its tempered copy, noise, softmax, entropy."""


@dataclass(frozen=True)
class Decoding:
    """How to sample. `steps` are over the whole answer and divide evenly over its blocks.

    `block_length`: 0 stands for 32, or for the model's own where it has blocks.
    `remasking`: low_confidence (LLaDA's) | maskgit_plus | top_margin | entropy (Dream's) | random. `threshold`: reveal
    every token of the block whose confidence (its probability) exceeds it, at least one a step; `steps` is then only an
    upper bound.
    `on_eos`: "last" gives the terminator confidence 0 (LLaDA 1.5's HumanEval setting), "forbid" never writes it.
    `block_cache`: reuse keys and values outside the block (approximate). `logits_budget`: bytes that the logits and all
    that is made of them may take at a time; it changes no answer.
    """

    gen_length: int = 128
    steps: int = 128
    block_length: int = 0
    temperature: float = 0.0
    cfg_scale: float = 0.0
    remasking: str = "low_confidence"
    threshold: float | None = None
    on_eos: str = "allow"
    block_cache: bool = False
    logits_budget: int = DEFAULT_LOGITS_BUDGET

    def __post_init__(self):
        if self.block_length == 0:
            object.__setattr__(self, "block_length", min(DEFAULT_BLOCK, max(1, self.gen_length)))
        orders = (*ORDERS, "random")
        rules = [
            (self.gen_length < 1, f"gen_length is {self.gen_length}; it must be at least 1"),
            (
                self.block_length < 1 or self.gen_length % max(1, self.block_length),
                f"block_length {self.block_length} must divide gen_length {self.gen_length}",
            ),
            (
                self.steps < 1 or self.steps % self.num_blocks,
                f"steps {self.steps} must be a positive multiple of the {self.num_blocks} blocks",
            ),
            (not 0 <= self.temperature < math.inf, f"temperature is {self.temperature}; it must be 0 or more"),
            (not 0 <= self.cfg_scale < math.inf, f"cfg_scale is {self.cfg_scale}; it must be 0 or more"),
            (self.remasking not in orders, f"remasking {self.remasking!r} is unknown; use one of {', '.join(orders)}"),
            (
                self.threshold is not None and not 0 < self.threshold < 1,
                f"threshold is {self.threshold}; it must lie between 0 and 1",
            ),
            (
                self.threshold is not None and self.remasking != "low_confidence",
                "a threshold needs remasking low_confidence",
            ),
            (self.on_eos not in ON_EOS, f"on_eos {self.on_eos!r} is unknown; use one of {', '.join(ON_EOS)}"),
        ]
        for wrong, message in rules:
            if wrong:
                raise UserError(message)

    @property
    def num_blocks(self) -> int:
        return max(1, self.gen_length // max(1, self.block_length))

    def reveal_counts(self) -> list[int]:
        """Tokens revealed at each step of one block: even, the remainder first."""
        steps = self.steps // self.num_blocks
        base, extra = divmod(self.block_length, steps)
        return [base + (step < extra) for step in range(steps)]


def option_of(name: str, value: Any) -> Any:
    """The field ``name`` of ``Decoding`` from what a person wrote. UserError where it is of another kind."""
    hint = get_type_hints(Decoding)[name]
    return None if value is None and type(None) in get_args(hint) else of_kind(name, value, kind_of(hint))


OnTokens = Callable[[int, list[int]], None]
Predictor = BlockPredictor | CausalBlockPredictor


def own_blocks(decoding: Decoding, size: int, name: str, *, asked: int) -> Decoding:
    """For a block-causal family: its own blocks of `size`, with as many tokens a step as asked for.

    UserError for options that have no meaning there; `asked`: the block length that was asked for, 0 if none.
    """
    if asked not in (0, size):
        raise UserError(f"{name} writes blocks of {size} tokens, not of {asked}: leave block_length out")
    if decoding.block_cache:
        raise UserError(f"{name} keeps its finished blocks as it is, exactly: leave block_cache out")
    if decoding.cfg_scale:
        raise UserError(f"classifier-free guidance is not built for {name}: leave cfg_scale out")
    steps = max(1, round(size * decoding.steps / decoding.gen_length))
    blocks = -(-decoding.gen_length // size)
    return replace(decoding, block_length=size, gen_length=blocks * size, steps=min(size, steps) * blocks)


def sample(
    model: nn.Module,
    spec: FamilySpec,
    prompts: Sequence[Sequence[int]],
    *,
    seed: int | Sequence[int | tuple[int, ...]] = 0,
    batch_size: int | None = None,
    on_step: OnTokens | None = None,
    on_answer: OnTokens | None = None,
    **options,
) -> list[list[int]]:
    """Answers, one per prompt, up to and excluding the terminator. `options` are the fields of `Decoding`.

    Prompts differ in length; each answer follows its own prompt. Noise is a function of (`seed`, index of the
    prompt), or of `seed[i]` when one is given per prompt (a number, or such a pair), so `batch_size` changes speed and
    memory only.
    `on_step(i, tokens)` is called after each step with the answer region of prompt i, masks included; `on_answer(i,
    answer)` when its batch is done, in the order of the prompts. UserError for an impossible option and for a prompt
    the context cannot hold.
    """
    block_length = options.pop("block_length", 0)
    # of a family with blocks the answer region need not be whole ones: ``own_blocks`` makes it so
    whole = options.get("gen_length", Decoding.gen_length)
    asked = decoding = Decoding(**options, block_length=whole if spec.block_size else block_length)
    if spec.block_size:
        decoding = own_blocks(asked, spec.block_size, spec.name, asked=block_length)
    for i, prompt in enumerate(prompts):
        if obstacle := prompt_obstacle(model, spec, prompt, decoding.gen_length):
            raise UserError(f"prompt {i}: {obstacle}")
    seeds: list[tuple[int, ...]] = (
        [(seed, i) for i in range(len(prompts))]
        if isinstance(seed, int)
        else [each if isinstance(each, tuple) else (each,) for each in seed]
    )
    if len(seeds) != len(prompts):
        raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one seed, or one per prompt")
    size, answers = batch_size or max(1, len(prompts)), []
    training = model.training
    model.eval()
    try:
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            canvas = Canvas(prompts[part], seeds[part], spec=spec, gen_length=asked.gen_length)
            for _ in fill(native(model), spec, canvas, decoding):
                if on_step:
                    for row in range(len(canvas)):
                        on_step(start + row, canvas.region(row))
            answers += [canvas.answer(row) for row in range(len(canvas))]
            if on_answer:
                for i in range(start, len(answers)):
                    on_answer(i, answers[i])
    finally:
        model.train(training)
    return answers


def prompt_obstacle(model: nn.Module, spec: FamilySpec, prompt: Sequence[int], gen_length: int) -> str:
    """Why a prompt cannot be answered (empty where a model cannot begin, too long for its context); '' if it can."""
    context = context_of(native(model).config)
    if spec.logit_shift and not prompt:
        return f"{spec.name} cannot answer an empty prompt: its first token is never predicted; add one"
    if context and len(prompt) + gen_length > context:
        return (
            f"it has {len(prompt)} tokens and gen_length is {gen_length}: together more than the model's context of "
            f"{context}; shorten one of them"
        )
    return ""


@torch.no_grad()
def fill(model: MaskedLM, spec: FamilySpec, canvas: Canvas, decoding: Decoding) -> Iterator[None]:
    """Reveal the whole canvas in place, block by block; yields after every step."""
    if spec.block_size:
        for causal, window_RB, rows in causal_blocks(model, spec, canvas):
            yield from _reveal(causal, canvas, window_RB, rows, decoding)
        return
    for block in range(decoding.num_blocks):
        window_RB = canvas.window(block * decoding.block_length, decoding.block_length)
        rows = [row for row in range(len(canvas)) if not canvas.ended(row)]
        predictor = BlockPredictor(
            model, spec, canvas, window_RB, cfg_scale=decoding.cfg_scale, cached=decoding.block_cache
        )
        yield from _reveal(predictor, canvas, window_RB, rows, decoding)


def _reveal(
    predictor: Predictor, canvas: Canvas, window_RB: Tensor, rows: list[int], decoding: Decoding
) -> Iterator[None]:
    """Reveal the window in each of `rows`, step by step."""
    for count in decoding.reveal_counts():
        rows = [row for row in rows if canvas.masked(window_RB)[row].any() and not canvas.ended(row)]
        if not rows:
            return
        _step(predictor, canvas, window_RB, rows, count, decoding)
        yield


def _step(predictor, canvas: Canvas, window_RB: Tensor, rows: list[int], count: int, decoding: Decoding) -> None:
    """Reveal at least `count` tokens of the window in each of `rows`."""
    row_M, column_M = canvas.masked(window_RB)[rows].nonzero(as_tuple=True)
    row_M = torch.tensor(rows)[row_M]
    token_M, confidence_M = _choices(predictor, canvas, row_M, column_M, decoding)
    if decoding.on_eos == "last":
        confidence_M[torch.isin(token_M, canvas.terminators)] = -1e30
    confidence_RB = torch.full(window_RB.shape, -torch.inf, dtype=torch.float64)
    confidence_RB[row_M, column_M] = confidence_M
    surest_RC = confidence_RB.topk(count, dim=-1).indices
    reveal_RB = torch.zeros_like(window_RB, dtype=torch.bool).scatter_(1, surest_RC, True)
    if decoding.threshold is not None:
        reveal_RB |= confidence_RB > decoding.threshold
    chosen_M = reveal_RB[row_M, column_M]
    canvas.reveal(row_M[chosen_M], window_RB[row_M, column_M][chosen_M], token_M[chosen_M])


def _choices(
    predictor: Predictor, canvas: Canvas, row_M: Tensor, column_M: Tensor, decoding: Decoding
) -> tuple[Tensor, Tensor]:
    """Tokens and confidences [M], on the CPU: one forward, then as many positions at a time as the budget allows."""
    hidden_GMK, chosen = predictor.hidden_states(row_M, column_M), []
    size = max(1, decoding.logits_budget // (len(predictor.model.embed.weight) * BYTES_A_LOGIT))
    for row_C, hidden_GCK in zip(row_M.split(size), hidden_GMK.split(size, dim=1), strict=True):
        logits_CV = predictor.logits(hidden_GCK)
        if not logits_CV.isfinite().all():  # the largest of them would be a token all the same
            raise UserError(
                "the model's logits are not finite: its weights are damaged or diverged, or overflow in 16 bits "
                "(--dtype float32)"
            )
        logits_CV[:, canvas.mask_token_id] = -torch.inf
        if decoding.on_eos == "forbid":
            logits_CV[:, canvas.terminators.to(logits_CV.device)] = -torch.inf
        noise = partial(canvas.noise, row_C, logits_CV.shape[1], logits_CV.device)
        found = choose(logits_CV, noise, temperature=decoding.temperature, order=decoding.remasking)
        chosen.append([part.cpu() for part in found])
    token_M, confidence_M = map(torch.cat, zip(*chosen, strict=True))
    if decoding.remasking == "random":
        confidence_M = canvas.noise(row_M, 1).squeeze(-1)
    return token_M, confidence_M
