"""Preference steps on a block-causal model: one clean stream a pair against plain `[noisy | clean]` rows, in one run.

    python benchmarks/block_throughput.py [--prompt 512 --answer 256 --n 4 --block 4 --width 256 --layers 4]
    python benchmarks/block_throughput.py --memory            peak resident memory of a step at n = 2 and n = 64

Both ways take the same model, noise and loss (two passes: scores, then gradients by segments of --segment_rows rows),
and the same segments. The plain way is the one of open code for block diffusion: each row is [noisy | clean], 2 (P + A)
tokens with a dense mask that its rows share, hidden states of the noisy half, and the head on masked positions only, as
here. CPU seconds of the process, the best of --repeats, in each of which the ways take turns; tokens are those run
through the layers forward, in both passes where there are two.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
import time
from functools import partial

import numpy as np
import torch
import torch.nn.functional as F

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.models.architecture.block_families import SDARConfig, SDARForCausalLM
from diffdpo.models.architecture.spec import DECODER_LORA_TARGETS, FamilySpec
from diffdpo.noise.options import NoiseOptions
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import fold, row_scores
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.segments import Segments
from diffdpo.step.backward import STRATEGIES, gradient_of

LIVE = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
"""For --memory: malloc gives buffers back at once, so that resident memory follows live tensors."""
WORLD = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))


class PlainLayout:
    """Rows [noisy | clean] under one dense mask."""

    def __init__(self, rows: int, length: int, block: int):
        self.rows, self.width, self.max_length = rows, 2 * length, length
        self.positions_N = torch.arange(length).repeat(2 * rows)
        of, clean = torch.arange(length).repeat(2) // block, torch.arange(2 * length) >= length
        seen_clean = torch.where(clean[:, None], of[:, None] >= of[None, :], of[:, None] > of[None, :])
        self.mask = torch.where(clean[None, :], seen_clean, ~clean[:, None] & (of[:, None] == of[None, :]))

    def at(self, layer: int) -> "PlainLayout":
        """Itself."""
        return self

    def attend(self, q_NHD, k_NGD, v_NGD):
        """[R * 2L, H * D]."""
        q, k, v = (t.unflatten(0, (self.rows, self.width)).transpose(1, 2) for t in (q_NHD, k_NGD, v_NGD))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=self.mask, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2).flatten(0, 1).flatten(1)


class PlainWay:
    """Two passes over rows [noisy | clean]."""

    def __init__(self, engine: PlainEngine, block: int, segment_rows: int):
        self.engine, self.block, self.segment_rows, self.tokens = engine, block, segment_rows, 0

    def forward(self, rows: NoisyRows) -> torch.Tensor:
        """f_R of rows of one answer."""
        assert rows.clean is not None
        answer, width = int(rows.answer_R[0]), int(rows.lengths_R[0])
        start = int(rows.clean.start_A[answer])
        clean_L = rows.clean.ids_AT[answer, : start + width]
        noisy_RL = torch.cat([clean_L[:start].expand(len(rows), -1), rows.input_ids_RT], 1)
        ids = torch.cat([noisy_RL, clean_L.expand(len(rows), -1)], 1)
        layout = PlainLayout(len(rows), len(clean_L), self.block)
        keep_M = rows.row_M * layout.width + start + rows.position_M
        self.tokens += ids.numel()
        hidden = self.engine.module.hidden_states(ids.flatten(), layout, keep_M)
        return row_scores(self.engine.module.log_probs(hidden, rows.target_M), rows)

    def step(self, rows: NoisyRows, loss_of) -> torch.Tensor:
        """Scores, then gradients."""
        pieces = [
            index for answer in range(rows.num_answers)
            for index in (rows.answer_R == answer).nonzero()[:, 0].split(self.segment_rows)
        ]  # fmt: skip
        with torch.no_grad():
            f_R = torch.cat([self.forward(rows.taken(piece)) for piece in pieces])
        gradient_R = gradient_of(loss_of, f_R)
        for piece in pieces:
            self.engine.backward((self.forward(rows.taken(piece)) * gradient_R[piece]).sum(), last=False)
        return f_R


def make(args) -> tuple[PlainEngine, FamilySpec]:
    """A model with random weights and its spec."""
    config = SDARConfig(
        hidden_size=args.width,
        num_hidden_layers=args.layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        intermediate_size=3 * args.width,
        vocab_size=args.vocab,
        rms_norm_eps=1e-6,
        rope_theta=1e4,
        tie_word_embeddings=False,
        mask_token_id=args.vocab - 1,
        eos_token_id=1,
        pad_token_id=1,
        block_size=args.block,
    )
    torch.manual_seed(0)
    names = {"name": "sdar", "block_class": "", "lora_targets": DECODER_LORA_TARGETS}
    spec = FamilySpec(mask_token_id=args.vocab - 1, terminator_id=1, pad_token_id=1, block_size=args.block, **names)
    module = MaskedLogProbs(SDARForCausalLM(config).requires_grad_(True), spec)
    return PlainEngine(module, WORLD, OptimizerOptions(learning_rate=0.0)), spec


def pair_batch(args) -> PairBatch:
    """One pair of random tokens, its answers different from their first token on."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(2, args.vocab - 1, args.prompt)
    sides = []
    for first in (2, 3):
        answer = rng.integers(2, args.vocab - 1, args.answer)
        answer[0], answer[-1] = first, 1
        sides.append(TokenAnswer(np.concatenate([prompt, answer]).astype(np.int32), args.prompt))
    return collate([TokenPair("0", *sides)], pad_id=1, epoch=0, step=0, micro=0, last_micro=True)


def loss_of_rows(rows: NoisyRows):
    """The sigmoid loss without a reference: what its gradient costs is the policy's."""

    def loss(f_R: torch.Tensor) -> torch.Tensor:
        score_B2 = fold(f_R, rows).score_B2
        return -F.logsigmoid(0.01 * (score_B2[:, 0] - score_B2[:, 1])).sum()

    return loss


def gradient_of_step(engine: PlainEngine) -> torch.Tensor:
    """What the last backward left, in one piece."""
    return torch.cat([p.grad.flatten() for p in engine.parameters if p.grad is not None])


def compare(args) -> dict:
    """All ways on the same rows, in turn: what else the machine does meets them alike."""
    engine, spec = make(args)
    noise = NoiseOptions("mask_count", args.n, 0, spec.mask_token_id, None, args.block)
    rows = noise.draw_rows(pair_batch(args), torch.device("cpu"))
    loss, segments = loss_of_rows(rows), Segments(rows=args.segment_rows)
    plain = PlainWay(engine, args.block, args.segment_rows)
    ways = {"plain": lambda: plain.step(rows, loss)}
    for name in args.strategies.split(","):
        ways[name] = partial(STRATEGIES[name], engine, rows, loss, segments=segments, last=True)
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    found: dict = {name: getattr(args, name) for name in ("prompt", "answer", "n", "block", "width", "layers", "vocab")}
    truth: tuple[torch.Tensor, torch.Tensor] | None = None
    for _ in range(args.repeats):
        for name, way in ways.items():
            engine.abort_step()
            engine.module.counted.computed = plain.tokens = 0
            started = time.process_time()
            f_R = way()
            seconds[name].append(time.process_time() - started)
            gradient = gradient_of_step(engine)
            truth = truth or (f_R, gradient)
            found[name] = {
                "cpu_seconds": min(seconds[name]),
                "times_as_fast": min(seconds["plain"]) / min(seconds[name]),
                "tokens": plain.tokens if name == "plain" else engine.module.counted.computed,
                "scores_off": float((f_R - truth[0]).abs().max() / truth[0].abs().max()),
                "gradient_off": float((gradient - truth[1]).norm() / truth[1].norm()),
            }
    return found


def peak(args) -> int:
    """Peak resident bytes of a shared step, in this process."""
    engine, spec = make(args)
    noise = NoiseOptions("mask_count", args.n, 0, spec.mask_token_id, None, args.block)
    rows = noise.draw_rows(pair_batch(args), torch.device("cpu"))
    STRATEGIES[args.strategies](engine, rows, loss_of_rows(rows), segments=Segments(rows=args.segment_rows), last=True)
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def memory(args) -> dict:
    """Peaks at n = 2 and n = 64, each in a process of its own, over that of the model alone."""
    found: dict = {}
    options = {
        name: getattr(args, name) for name in ("prompt", "answer", "block", "width", "layers", "vocab", "segment_rows")
    }
    for strategy in args.strategies.split(","):
        peaks = {}
        for n in (2, 64):
            command = [sys.executable, __file__, "--peak", "--n", str(n), "--strategies", strategy]
            command += [text for name, value in options.items() for text in (f"--{name}", str(value))]
            peaks[n] = int(
                subprocess.run(
                    command, check=True, capture_output=True, text=True, env=os.environ | LIVE
                ).stdout.split()[-1]
            )
        found[strategy] = {"n=2": peaks[2], "n=64": peaks[64], "grows": peaks[64] / peaks[2] - 1}
    return found


def main() -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"prompt": 512, "answer": 256, "n": 4, "block": 4, "width": 256, "layers": 4, "vocab": 512}
    for name, value in {**sizes, "segment_rows": 2, "repeats": 2}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--strategies", default="none,two_pass,deferred,checkpoint")
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--peak", action="store_true")
    args = parser.parse_args()
    if args.peak:
        print(peak(args))
        return
    print(json.dumps(memory(args) if args.memory else compare(args), indent=1))


if __name__ == "__main__":
    main()
