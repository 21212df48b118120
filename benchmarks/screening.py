"""Does leaving pairs out of a step pay in a training run? Screened training against the default, at equal CPU time.

    python benchmarks/screening.py --out runs/screening --seeds 3

The bundled model, all weights, the sigmoid loss with a small sft term, n = 4 balanced rows, steps of 8 pairs, one
graph. Screened: the row of each answer with the largest mask guesses h without a graph (0.5 F of 4); a pair goes on
with p = min(1, max(0.05, 4 σ(-ĥ/2))), runs all rows, and its loss is divided by p, so that the mean of the gradient is
that of all pairs (docs/performance.md). "screened": what is saved becomes more steps. "screened, 16": steps of 16
pairs. The learning rate falls with the share of the time that is used, so that every run ends at 0.

A cell is one way and seed; OUT/WAY-SEED.json is not made again.
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from likelihoods import BETA, RATE, judged, log_probs, mean_and_error, pairs_of
from scoring import Models, load_models

import diffdpo
from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import TokenPair
from data_pipeline.files import write_whole
from data_pipeline.generate import generate_pairs
from diffdpo.losses.preference import preference_loss
from diffdpo.models.load import LoadedModel
from diffdpo.noise.rows import NoisyRows, noisy_rows
from diffdpo.scores.fold import fold, row_scores

ROWS, SFT, WARMUP = 4, 0.05, 0.03
WAYS = {"default": (8, False), "screened": (8, True), "screened, 16": (16, True)}  # pairs of a step, screened
SHOWN = {"accuracy": "preference accuracy", "exact_match": "exact match", "steps": "steps", "kept": "kept at the end"}


def main() -> None:
    """Run what is not there and print the table after each seed."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", default="runs/screening")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--seconds", type=float, default=60.0, help="CPU seconds of training")
    parser.add_argument("--problems", type=int, default=400)
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for seed in range(args.seeds):
        for way in WAYS:
            cell = out / f"{way}-{seed}.json".replace(" ", "_").replace(",", "")
            if not cell.exists():
                model, told = train(way, seed=seed, seconds=args.seconds)
                found = {"way": way, "seed": seed, **told, **judged(model, out, args.problems)}
                write_whole(cell, (json.dumps(found) + "\n").encode())
                print(found, flush=True)
        print(table(out), flush=True)


def train(way: str, *, seed: int, seconds: float) -> tuple[LoadedModel, dict[str, float]]:
    """The bundled model after so many CPU seconds of steps, and what the run says of itself."""
    size, screened = WAYS[way]
    loaded, models = diffdpo.load(), load_models(None, None, dpo_steps=0, device="cpu", seed=seed)
    models.policy.model.load_state_dict(loaded.model.state_dict())
    optimizer = torch.optim.AdamW(models.policy.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.999))
    records, rng = pairs_of(models, generate_pairs(10**9, seed=seed)), np.random.default_rng(seed)
    started, kept, step = time.process_time(), list[float](), 0
    while (used := (time.process_time() - started) / seconds) < 1:
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, used / WARMUP) * (1 - used)
        pairs = list(islice(records, size))
        p_P = probabilities(models, pairs, seed, step) if screened else np.ones(size)
        chosen = np.flatnonzero(rng.random(size) < p_P)
        kept.append(len(chosen) / size)
        optimizer.zero_grad()
        if len(chosen):
            losses_P = losses(models, [pairs[i] for i in chosen], seed, step)
            (losses_P / torch.from_numpy(p_P[chosen]).float()).sum().div(size).backward()
            torch.nn.utils.clip_grad_norm_(models.policy.parameters(), 1.0)
            optimizer.step()
        step += 1
    loaded.model.load_state_dict(models.policy.model.state_dict())
    return loaded, {"steps": step, "pairs": step * size, "kept": float(np.mean(kept[-step // 5 :]))}


def drawn(models: Models, pairs: list[TokenPair], seed: int, step: int) -> tuple[PairBatch, NoisyRows]:
    """Rows of some pairs of a step: those of a pair are the same whatever others are asked for."""
    batch = collate(pairs, pad_id=0, epoch=step, step=step, micro=0, last_micro=True)
    mask = models.mask_token_id
    return batch, noisy_rows(batch, estimator="balanced", num_samples=ROWS, seed=seed, mask_token_id=mask)


@torch.no_grad()
def probabilities(models: Models, pairs: list[TokenPair], seed: int, step: int) -> np.ndarray:
    """p of each pair, from the row with the largest mask of both answers."""
    _, rows = drawn(models, pairs, seed, step)
    masked_R = torch.bincount(rows.row_M, minlength=len(rows)).view(-1, ROWS)
    last_A = masked_R.argmax(1) + ROWS * torch.arange(len(masked_R))
    part = rows.taken(last_A)
    ratio_A = row_scores(log_probs(models.policy, part) - log_probs(models.reference, part), part)
    ratio_A = ratio_A * part.weight_R * rows.tokens_A / part.share_R
    h_P = BETA * (ratio_A.view(-1, 2)[:, 0] - ratio_A.view(-1, 2)[:, 1])
    return (4 * torch.sigmoid(-h_P / 2)).clamp(0.05, 1).double().numpy()


def losses(models: Models, pairs: list[TokenPair], seed: int, step: int) -> torch.Tensor:
    """Of each pair, differentiable."""
    _, rows = drawn(models, pairs, seed, step)
    policy_B2 = fold(row_scores(log_probs(models.policy, rows), rows), rows).score_B2
    with torch.no_grad():
        reference_B2 = fold(row_scores(log_probs(models.reference, rows), rows), rows).score_B2
    tokens_B2 = rows.tokens_A.view(-1, 2)
    loss_B = preference_loss("sigmoid", policy_B2=policy_B2, reference_B2=reference_B2, tokens_B2=tokens_B2, beta=BETA)
    return loss_B - SFT * policy_B2[:, 0] / tokens_B2[:, 0]


def table(out: Path) -> str:
    """Means over seeds ± their standard error."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*-*.json"))]
    lines = ["| way | seeds | " + " | ".join(SHOWN.values()) + " |", "|---" * (2 + len(SHOWN)) + "|"]
    for way in WAYS:
        ones = [one for one in found if one["way"] == way]
        if ones:
            cells = [mean_and_error([one[name] for one in ones]) for name in ("accuracy", "exact_match")]
            cells.append(f"{np.mean([one['steps'] for one in ones]):.0f}")
            cells.append(f"{np.mean([one['kept'] for one in ones]):.0%}")
            lines.append(f"| {way} | {len(ones)} | {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
