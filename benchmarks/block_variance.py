"""Variance of block scores on a block-causal model: estimators within blocks, against one t for a whole sequence.

    python benchmarks/block_variance.py --model DIR [--pairs pairs.jsonl] [--records 8 --draws 100]

`sequence_t` is the published way (LLaDA2.0, arXiv 2512.15745, section 5.3, with one sample): t ~ U(eps, 1) once a row,
every token of the answer masked with probability t, weight 1/t, each block given the clean ones before it. The other
estimators draw every block by itself (docs/theory.md, section 6). Printed: the mean over answers of the variance over
draws of the score, of pairs that of the difference of both sides, and how far the mean over draws is from `exact` in
its standard errors.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import Drop
from data_pipeline.generate import generate_pairs
from data_pipeline.sources.formats import convert
from diffdpo.config import ScoreConfig
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.noise.block_score import block_tokens, draw_block_plan
from diffdpo.noise.estimators import EPSILON
from diffdpo.noise.plan import NoiseKey, NoisePlan
from diffdpo.noise.rows import rows_of_plans
from diffdpo.scores.fold import fold
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import Segments

Plan = Callable[[int, int, str, int], NoisePlan]
CASES = (("sequence_t", 1), ("sequence_t", 4), ("uniform_t", 1), ("uniform_t", 4), ("mask_count", 1))
CASES += (("mask_count", 4), ("mask_count_mirror", 4), ("balanced", 2), ("balanced", 4), ("balanced", 8))


def sequence_t(length: int, n: int, key: NoiseKey) -> NoisePlan:
    """One t a row for all blocks."""
    rng = key.generator()
    t_N = EPSILON + (1 - EPSILON) * rng.random(n)
    masked_NL = rng.random((n, length)) < t_N[:, None]
    return NoisePlan(masked_NL, masked_NL, 1 / (n * t_N), np.full(n, length / n))


def plan_of(estimator: str, n: int, block: int, draw: int) -> Plan:
    """The rows of an answer in one draw."""

    def plan(prompt: int, length: int, record: str, side: int) -> NoisePlan:
        key = NoiseKey(0, 0, record, side, draw)
        if estimator == "sequence_t":
            return sequence_t(length, n, key)
        return draw_block_plan(estimator, tokens=block_tokens(prompt, length, block), num_samples=n, key=key)

    return plan


def scores(module: MaskedLogProbs, batch: PairBatch, plan: Plan) -> np.ndarray:
    """Scores [B, 2]."""
    spec = module.spec
    rows = rows_of_plans(batch, plan, empty_rows=1, mask_token_id=spec.mask_token_id, block_size=spec.block_size)
    return fold(score_rows(module, rows, segments=Segments(tokens=16384)), rows).score_B2.double().numpy()


def records(source: str | None, count: int) -> Iterator:
    """Pairs of a file, or generated ones."""
    lines = map(json.loads, Path(source).read_text().splitlines()) if source else generate_pairs(count, seed=1)
    for line in lines:
        yield from convert(line)


def batch_of(loaded: LoadedModel, args) -> PairBatch:
    """The first pairs that fit."""
    encoder = make_encoder(ScoreConfig(max_length=128, max_prompt_length=64), loaded.tokenizer, loaded.spec)
    pairs = [pair for pair in map(encoder, records(args.pairs, args.records)) if not isinstance(pair, Drop)]
    return collate(pairs[: args.records], pad_id=0, epoch=0, step=0, micro=0, last_micro=True)


def main() -> None:
    """Print a line a case."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs")
    parser.add_argument("--records", type=int, default=8)
    parser.add_argument("--draws", type=int, default=100)
    args = parser.parse_args()
    loaded = load_model(args.model)
    module, batch = MaskedLogProbs(loaded.model, loaded.spec).eval(), batch_of(loaded, args)
    block = loaded.spec.block_size
    assert block, "--model has no blocks"
    exact = scores(module, batch, plan_of("exact", 1, block, 0))
    print(f"{len(exact)} pairs, blocks of {block}, exact scores {exact.mean():.2f}; {args.draws} draws")
    for estimator, n in CASES:
        drawn = np.stack([scores(module, batch, plan_of(estimator, n, block, draw)) for draw in range(args.draws)])
        difference = drawn[..., 0] - drawn[..., 1]
        off = (drawn.mean(0) - exact) / (drawn.std(0, ddof=1) / args.draws**0.5 + 1e-9)
        print(
            f"{estimator:18s} n = {n}: variance of a score {drawn.var(0, ddof=1).mean():9.3f}, of a difference "
            f"{difference.var(0, ddof=1).mean():9.3f}; mean off by {np.sqrt((off**2).mean()):.2f} standard errors",
            flush=True,
        )


if __name__ == "__main__":
    main()
