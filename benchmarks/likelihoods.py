"""Which likelihood should the loss compare? Kinds of score at equal cost, by what a model trained with them can do.

    python benchmarks/likelihoods.py --out runs/likelihoods --seeds 3

The bundled model, the sigmoid loss, n rows an answer, the same pairs and number of updates for every kind:

    elbo                 the any-order ELBO of the default estimator on both sides
    elbo, uniform_t      LLaDA's and VRPO's estimator of it
    eubo rejected        an evidence upper bound for the rejected side: of each token the mean over rows of p^b, to the
                         power 1/b, b = 1.5 (SPG, arXiv 2510.09541; TUBE, 2605.24292), the ELBO for the chosen side
    half eubo rejected   the mean of both bounds for the rejected side, as SPG uses it
    sampler's order      the trajectory in the order in which the reference would reveal the answer, surest token first,
                         n parts, one row for each (DUEL, 2603.01367; dTRPO, 2603.18806)
    bell                 counts of masked tokens from a bell-shaped density (2605.13026), weighted back

A cell is one kind and seed; OUT/KIND-SEED.json is not made again. The trained model is judged by ``diffdpo.evaluate``:
preference accuracy by the ELBO of 16 balanced rows, exact match of sampled answers. `--orders` asks instead how often
each likelihood of the untrained model prefers the chosen answer.

Shape suffixes: A answers, R rows, M scored positions, N rows of an answer, L its tokens.
"""

import argparse
import json
import math
from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from scoring import Models, answer, load_models
from torch import Tensor

import diffdpo
from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import TokenPair
from data_pipeline.files import write_whole
from data_pipeline.generate import generate_pairs, write_jsonl
from diffdpo.losses.preference import preference_loss
from diffdpo.models.architecture.layout import Layout
from diffdpo.models.load import LoadedModel
from diffdpo.noise.plan import NoiseKey, NoisePlan
from diffdpo.noise.rows import NoisyRows, noisy_rows, rows_of_plans
from diffdpo.scores.fold import fold, row_scores

SHOWN = {"accuracy": "preference accuracy", "exact_match": "exact match"}
POWER = 1.5
KINDS = ("elbo", "elbo, uniform_t", "eubo rejected", "half eubo rejected", "sampler's order", "bell")
SHARE = {"eubo rejected": 1.0, "half eubo rejected": 0.5}
BATCH, BETA, RATE, WARMUP = 8, 0.1, 3e-4, 5


def main() -> None:
    """Run what is not there and print the table after each seed."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", default="runs/likelihoods")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--samples", type=int, default=4, help="n, rows an answer")
    parser.add_argument("--problems", type=int, default=200)
    parser.add_argument("--orders", action="store_true", help="likelihoods of the untrained model as judges")
    args = parser.parse_args()
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    if args.orders:
        print(judges(args.problems))
        return
    for seed in range(args.seeds):
        for kind in KINDS:
            cell = out / f"{kind}-{seed}.json".replace(" ", "_").replace(",", "").replace("'", "")
            if not cell.exists():
                model = train(kind, seed=seed, steps=args.steps, num_samples=args.samples)
                found = {"kind": kind, "seed": seed, **judged(model, out, args.problems)}
                write_whole(cell, (json.dumps(found) + "\n").encode())
        print(table(out), flush=True)


def train(kind: str, *, seed: int, steps: int, num_samples: int) -> LoadedModel:
    """The bundled model after so many updates with one kind of score."""
    loaded = diffdpo.load()
    models = load_models(None, None, dpo_steps=0, device="cpu", seed=seed)
    models.policy.model.load_state_dict(loaded.model.state_dict())
    optimizer = torch.optim.AdamW(models.policy.parameters(), lr=RATE, weight_decay=0.0, betas=(0.9, 0.999))
    records = pairs_of(models, generate_pairs(10**9, seed=seed))
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / WARMUP) * (1 - max(0, step - WARMUP) / steps)
        batch = collate(list(islice(records, BATCH)), pad_id=0, epoch=0, step=step, micro=0, last_micro=True)
        rows = rows_of(kind, models, batch, num_samples=num_samples, seed=seed)
        with torch.no_grad():
            reference_B2 = score(kind, log_probs(models.reference, rows), rows)
        policy_B2 = score(kind, log_probs(models.policy, rows), rows)
        tokens_B2 = rows.tokens_A.view(-1, 2)
        loss = preference_loss(
            "sigmoid", policy_B2=policy_B2, reference_B2=reference_B2, tokens_B2=tokens_B2, beta=BETA
        ).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(models.policy.parameters(), 1.0)
        optimizer.step()
    loaded.model.load_state_dict(models.policy.model.state_dict())
    return loaded


def pairs_of(models: Models, records):
    """Generated records as token pairs."""
    for record in records:
        prompt = models.encode(record["prompt"])
        chosen, rejected = ([*models.encode(record[side]), models.terminator_id] for side in ("chosen", "rejected"))
        yield TokenPair(record["id"], answer(prompt, chosen), answer(prompt, rejected))


def log_probs(forward: Callable[..., Tensor], rows: NoisyRows) -> Tensor:
    """log p of every scored position [M]."""
    return forward(rows.input_ids_RT, rows.lengths_R, rows.row_M, rows.position_M, rows.target_M)


def rows_of(kind: str, models: Models, batch: PairBatch, *, num_samples: int, seed: int) -> NoisyRows:
    """n rows an answer. The upper bound needs weights that are not negative: antithetic counts for both sides."""
    if kind in ("bell", "sampler's order"):
        order = sampler_order(models.reference, models.mask_token_id, batch) if kind != "bell" else None
        index = {record: b for b, record in enumerate(batch.ids)}

        def plan(_prompt: int, length: int, record: str, side: int) -> NoisePlan:
            if order is not None:
                return in_order(order[2 * index[record] + side], num_samples)
            return bell(length, num_samples, NoiseKey(seed, 0, record, side).generator())

        return rows_of_plans(batch, plan, empty_rows=num_samples, mask_token_id=models.mask_token_id)
    named = {"elbo": "balanced", "elbo, uniform_t": "uniform_t"}.get(kind, "mask_count_mirror")
    return noisy_rows(batch, estimator=named, num_samples=num_samples, seed=seed, mask_token_id=models.mask_token_id)


def score(kind: str, logp_M: Tensor, rows: NoisyRows) -> Tensor:
    """[B, 2]; differentiable."""
    elbo_B2 = fold(row_scores(logp_M, rows), rows).score_B2
    if kind not in SHARE:
        return elbo_B2
    rejected_B = (1 - SHARE[kind]) * elbo_B2[:, 1] + SHARE[kind] * upper_bound(logp_M, rows).view(-1, 2)[:, 1]
    return torch.stack((elbo_B2[:, 0], rejected_B), dim=1)


def upper_bound(logp_M: Tensor, rows: NoisyRows, *, power: float = POWER) -> Tensor:
    """Σ_i 1/b log Σ_r w_ir p_ir^b of each answer [A], w the rows' weights for token i made to sum to 1 (SPG, eq. 9)."""
    longest = rows.input_ids_RT.shape[1]
    cell_M = rows.answer_R[rows.row_M] * longest + rows.position_M  # a token of an answer
    weight_M = rows.weight_R[rows.row_M] * rows.scale_M
    places = rows.num_answers * longest
    total, mean = weight_M.new_zeros(places), weight_M.new_zeros(places)
    total = total.index_add(0, cell_M, weight_M)
    mean = mean.index_add(0, cell_M, weight_M / total[cell_M] * torch.exp(power * logp_M).to(weight_M.dtype))
    return torch.where(total > 0, mean.clamp(min=1e-30).log() / power, 0.0).view(rows.num_answers, longest).sum(1)


@torch.no_grad()
def sampler_order(forward: Callable[..., Tensor], mask_token_id: int, batch: PairBatch) -> list[np.ndarray]:
    """Of each answer (2 b + side): its tokens' places in the order in which low-confidence sampling would reveal them,
    if it wrote this answer: the place whose best token is surest comes first (2603.01367)."""
    orders = []
    ids, lengths, prompts = (t.flatten(0, 1) for t in (batch.input_ids_B2T, batch.lengths_B2, batch.prompt_lengths_B2))
    for ids_T, length, prompt in zip(ids, lengths.tolist(), prompts.tolist(), strict=True):
        row_T, order = ids_T[:length].clone(), list[int]()
        row_T[prompt:] = mask_token_id
        while len(order) < length - prompt:
            left = torch.tensor([i for i in range(length - prompt) if i not in order])
            sure = surest(forward, row_T, left + prompt)
            place = int(left[sure])
            order.append(place)
            row_T[prompt + place] = ids_T[prompt + place]
        orders.append(np.array(order))
    return orders


def surest(forward, row_T: Tensor, position_M: Tensor) -> int:
    """Which of the masked positions has the surest prediction."""
    model, shift = forward.model, forward.spec.logit_shift
    layout = Layout.packed([len(row_T)], len(row_T), device=row_T.device, max_waste=0.0)
    hidden = model.hidden_states(row_T, layout, keep_M=position_M - shift)
    return int(model.head(hidden).float().softmax(-1).max(-1).values.argmax())


def in_order(order_L: np.ndarray, parts: int) -> NoisePlan:
    """Row s masks what is revealed from part s on, and scores part s; all of them are the whole trajectory."""
    length = len(order_L)
    part_L = np.empty(length, np.int64)
    part_L[order_L] = np.arange(length) * parts // length
    masked_NL = part_L >= np.arange(parts)[:, None]
    scored_NL = part_L == np.arange(parts)[:, None]
    return NoisePlan(masked_NL, scored_NL, np.ones(parts), scored_NL.sum(1).astype(float))


def bell(length: int, num_samples: int, rng: np.random.Generator) -> NoisePlan:
    """Counts k of masked tokens with probability q_k ∝ 0.2 + sin²(π (k - ½) / L), stratified; weight 1/(k q_k n)."""
    q_K = 0.2 + np.sin(math.pi * (np.arange(1, length + 1) - 0.5) / length) ** 2
    q_K /= q_K.sum()
    place_N = (np.arange(num_samples) + rng.random(num_samples)) / num_samples
    k_N = np.minimum(np.searchsorted(q_K.cumsum(), place_N), length - 1) + 1
    masked_NL = np.argsort(np.argsort(rng.random((num_samples, length)), 1), 1) < k_N[:, None]
    weight_N = 1 / (k_N * q_K[k_N - 1] * num_samples)
    return NoisePlan(masked_NL, masked_NL, weight_N, np.full(num_samples, length / num_samples))


def judged(model: LoadedModel, out: Path, problems: int) -> dict[str, float]:
    """Held-out figures by name."""
    held_out = out / "held_out.jsonl"
    if not held_out.exists():
        write_jsonl(generate_pairs(problems, seed=0, split="eval"), held_out)
    found = diffdpo.evaluate(
        str(held_out),
        model,
        task=["pairs", "arithmetic"],
        reference=diffdpo.load(),
        num_mc_samples=16,
        tracking_uri="none",
    )
    figures = {**found["results"][0]["figures"], **found["results"][1]["figures"]}
    return {name: figures[name]["mean"] for name in SHOWN}


def judges(pairs: int) -> str:
    """How often each likelihood of the untrained model is higher for the chosen answer, as it is and per token."""
    models = load_models(None, None, dpo_steps=0, device="cpu", seed=0)
    records = pairs_of(models, generate_pairs(pairs, seed=0, split="eval"))
    found: dict[str, list[tuple[float, float]]] = {}
    for step, pair in enumerate(records):
        batch = collate([pair], pad_id=0, epoch=0, step=step, micro=0, last_micro=True)
        wanted = {"ELBO, 16 rows": ("elbo", 16), "ELBO, a row a token": ("elbo", 0)}
        wanted |= {"upper bound, 16 rows": ("eubo", 16)}
        wanted |= {
            "sampler's order, 4 parts": ("sampler's order", 4),
            "sampler's order, token by token": ("sampler's order", 0),
        }
        for name, (kind, rows_an_answer) in wanted.items():
            count = rows_an_answer or int((batch.lengths_B2 - batch.prompt_lengths_B2).max())
            rows = rows_of(kind, models, batch, num_samples=count, seed=0)
            with torch.no_grad():
                logp_M = log_probs(models.reference, rows)
            whole = upper_bound(logp_M, rows) if kind == "eubo" else fold(row_scores(logp_M, rows), rows).score_B2[0]
            each = whole / rows.tokens_A
            found.setdefault(name, []).append((float(whole[0] > whole[1]), float(each[0] > each[1])))
    lines = ["| likelihood | chosen likelier | per token | less the ELBO's, pair by pair |", "|---" * 4 + "|"]
    elbo = np.array(found["ELBO, a row a token"])[:, 1]
    for name, values in found.items():
        shares = [share_and_error(column) for column in np.array(values).T]
        shares.append(share_and_error(np.array(values)[:, 1] - elbo) if name != "ELBO, a row a token" else "")
        lines.append(f"| {name} | {' | '.join(shares)} |")
    return "\n".join(lines)


def share_and_error(values: np.ndarray) -> str:
    return f"{values.mean():.1%} ± {values.std(ddof=1) / math.sqrt(len(values)):.1%}"


def table(out: Path) -> str:
    """Means over seeds ± their standard error."""
    found = [json.loads(path.read_text()) for path in sorted(out.glob("*-*.json"))]
    lines = ["| kind | seeds | " + " | ".join(SHOWN.values()) + " |", "|---" * (2 + len(SHOWN)) + "|"]
    for kind in KINDS:
        ones = [one for one in found if one["kind"] == kind]
        if ones:
            cells = [mean_and_error([one[name] for one in ones]) for name in SHOWN]
            lines.append(f"| {kind} | {len(ones)} | {' | '.join(cells)} |")
    return "\n".join(lines)


def mean_and_error(values: list[float]) -> str:
    mean = sum(values) / len(values)
    if len(values) < 2:
        return f"{mean:.1%}"
    return f"{mean:.1%} ± {np.std(values, ddof=1) / math.sqrt(len(values)):.1%}"


if __name__ == "__main__":
    main()
