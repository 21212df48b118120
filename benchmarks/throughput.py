"""Pairs per second of preference training with LoRA: this package's step against the plain one, in one run.

    python benchmarks/throughput.py                          # the shapes that suit this device
    python benchmarks/throughput.py --shapes small --repeats 5
    python benchmarks/throughput.py --shapes medium --numbers 8 --repeats 1 --warm_up 0 --keep  # adds to it

The plain step is what implementations of the field do: a row for every mask, padded to the longest of the micro-batch,
logits of every position in fp32, a second model as the reference, layers recomputed in the backward, one graph, noise
as in VRPO (t uniform, `uniform_t`). Ours is `PreferenceStep` as `launch/train.py` builds it, with the reference as the
policy without its adapter or from scores computed before, with and without `--torch_compile` (compilation is not
timed), and with segments sized by `--max_memory 0.5`. Same weights, same pairs, same optimizer; the row scores of both
are compared first (`difference`). At the same n ours has the lower variance; the last column sets ours at n = 4 against
the plain step at n = 8, whose variances docs/theory.md, section 3, compares.

Model FLOPs are those of real tokens: forward of policy and reference and the policy's backward with respect to
activations, 2 FLOPs a weight and token in each, attention, and the head at scored tokens. Nothing recomputed and no
padding counts. Utilisation is their rate over that of large matrix products, measured in the same run.

Writes docs/benchmarks/throughput.{json,md}.
"""

import argparse
import copy
import json
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.nn.functional import logsigmoid
from torch.utils.checkpoint import checkpoint

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.engine.base import trains_few
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.gpus import is_gpu, kind_of
from diffdpo.losses.options import LossOptions
from diffdpo.models.architecture.backbone import native
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
from diffdpo.models.architecture.spec import LLADA_LORA_TARGETS, FamilySpec
from diffdpo.models.lora.adapters import add_lora
from diffdpo.noise.options import NoiseOptions
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import adapter_off_reference
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import Segments
from diffdpo.step.fit import fit_segments
from diffdpo.step.step import PreferenceStep
from diffdpo.step.strategy import MicroBatchShape, choose_strategy

BETA, RATE, RANK, MAX_MEMORY = 0.1, 1e-5, 16, 0.5
OURS, FIELD = "balanced", "uniform_t"


@dataclass(frozen=True)
class Shape:
    """A model of LLaDA's layout, and pairs whose prompts and answers have log-normal lengths round these medians."""

    width: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    pairs: int
    prompt: int
    answer: int
    max_length: int
    dtype: str = "float32"


SHAPES = {
    "tiny": Shape(128, 4, 4, 512, 512, 8, 24, 40, 160),
    "small": Shape(384, 6, 6, 1024, 8192, 4, 60, 100, 384),
    "medium": Shape(768, 12, 12, 2048, 32000, 2, 60, 100, 384),
    "small_llada_vocab": Shape(384, 6, 6, 1024, 126464, 2, 60, 100, 384),
    "1b": Shape(2048, 16, 16, 5632, 126464, 4, 200, 300, 1024, "bfloat16"),
    "8b": Shape(4096, 32, 32, 12288, 126464, 2, 200, 300, 1024, "bfloat16"),
}
ON_CPU, ON_GPU = ("tiny", "small", "medium", "small_llada_vocab"), ("small", "medium", "1b", "8b")
SPREAD = 0.6  # of the logarithm of a length


def plain_model(shape: Shape) -> tuple[LLaDAModelLM, FamilySpec]:
    """Random weights, the same at every call."""
    config = LLaDAConfig.create(
        d_model=shape.width,
        n_layers=shape.layers,
        n_heads=shape.heads,
        mlp_hidden_size=shape.mlp,
        vocab_size=shape.vocab,
        mask_token_id=shape.vocab - 1,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    spec = FamilySpec("llada", shape.vocab - 1, 0, 0, "LLaDABlock", LLADA_LORA_TARGETS)
    return LLaDAModelLM(config), spec


def make_model(shape: Shape, device: torch.device) -> tuple[nn.Module, FamilySpec]:
    """Random weights with LoRA on every block; the adapter's second factor is not 0, so that its first learns."""
    torch.set_default_dtype(getattr(torch, shape.dtype))
    with device:
        whole, spec = plain_model(shape)
        model = add_lora(whole, spec, r=RANK)
    torch.set_default_dtype(torch.float32)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.01)
    return model, spec


def make_batch(shape: Shape, *, spread: float = SPREAD) -> PairBatch:
    """Pairs of random tokens with the shape's lengths."""
    generator = np.random.default_rng(0)

    def length(median: int, most: int) -> int:
        return int(np.clip(round(median * np.exp(spread * generator.standard_normal())), 4, most))

    def pair(number: int) -> TokenPair:
        prompt = generator.integers(1, shape.vocab - 1, length(shape.prompt, shape.max_length // 2))
        room = shape.max_length - len(prompt)
        answers = (generator.integers(1, shape.vocab - 1, length(shape.answer, room)) for _ in range(2))
        sides = [TokenAnswer(np.concatenate([prompt, answer]).astype(np.int32), len(prompt)) for answer in answers]
        return TokenPair(f"pair-{number}", *sides)

    pairs = [pair(number) for number in range(shape.pairs)]
    return collate(pairs, pad_id=0, epoch=0, step=0, micro=0, last_micro=True)


# ------------------------------------------------------------------------------------------------- the plain step


def plain_row_scores(
    model: nn.Module, rows: NoisyRows, *, recompute: bool = True, forward: Callable[..., torch.Tensor] | None = None
) -> torch.Tensor:
    """f_R with everything computed: padding, every position's logits, and layers again in the backward. ``forward``: of
    a block, in place of its own."""
    base, columns = native(model), torch.arange(rows.input_ids_RT.shape[1], device=rows.lengths_R.device)
    blocks = list(base.blocks)
    for block in blocks:
        whole = forward or type(block).forward
        again = recompute and torch.is_grad_enabled()
        block.forward = partial(checkpoint, whole, block, use_reentrant=False) if again else partial(whole, block)
    logits = base(rows.input_ids_RT, attention_mask=(columns < rows.lengths_R[:, None]).long()).logits
    for block in blocks:
        block.__dict__.pop("forward", None)
    logp_RTV = logits.float().log_softmax(-1)
    logp_M = logp_RTV[rows.row_M, rows.position_M].gather(-1, rows.target_M[:, None]).squeeze(-1)
    return logp_M.new_zeros(len(rows)).index_add(0, rows.row_M, logp_M * rows.scale_M.float())


class PlainStep:
    """One graph of all rows, a second model, AdamW. ``recompute``: layers in the backward; ``compiled``: blocks."""

    def __init__(
        self,
        policy: nn.Module,
        noise: NoiseOptions,
        device: torch.device,
        *,
        recompute: bool = True,
        compiled: bool = False,
    ):
        self.policy, self.noise, self.device = policy, noise, device
        block = type(next(iter(native(policy).blocks)))
        self.forward = torch.compile(block.forward, dynamic=True) if compiled else None
        self.recompute = recompute
        self.reference = copy.deepcopy(policy).requires_grad_(False)
        self.trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=RATE)

    def __call__(self, batch: PairBatch) -> None:
        self.gradients(batch)
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def gradients(self, batch: PairBatch) -> None:
        rows = self.noise.draw_rows(batch, self.device)
        with torch.no_grad(), self.reference.disable_adapter():
            reference_R = plain_row_scores(self.reference, rows, forward=self.forward)
        policy_R = plain_row_scores(self.policy, rows, recompute=self.recompute, forward=self.forward)
        ratio_R = (policy_R - reference_R) * rows.weight_R.float()
        ratio_A = ratio_R.new_zeros(rows.num_answers).index_add(0, rows.answer_R, ratio_R)
        (-logsigmoid(BETA * (ratio_A[0::2] - ratio_A[1::2])).mean()).backward()


# ------------------------------------------------------------------------------------------------- ours


def engine_of(policy: nn.Module, spec: FamilySpec, *, compiled: bool = False) -> PlainEngine:
    """Plain torch, where the policy is."""
    world = World(0, 0, 1, next(policy.parameters()).device)
    module = MaskedLogProbs(policy, spec, compile_blocks=compiled)
    return PlainEngine(module, world, OptimizerOptions(RATE, max_grad_norm=1.0))


def place_of(shape: Shape, n: int) -> MicroBatchShape:
    """What is known of the shape's micro-batch before it is read."""
    return MicroBatchShape(shape.pairs, n, shape.max_length, couples_pairs=False)


def our_step(
    policy: nn.Module,
    spec: FamilySpec,
    noise: NoiseOptions,
    shape: Shape,
    segments: Segments,
    *,
    precomputed: bool,
    compiled: bool,
) -> tuple[PreferenceStep, str]:
    """The step as it is built for training, and its strategy. ``precomputed``: the reference's scores are at hand."""
    engine, place = engine_of(policy, spec, compiled=compiled), place_of(shape, noise.num_samples)
    reference = adapter_off_reference(engine, policy, segments=segments)
    if precomputed:
        kept: dict[int, torch.Tensor] = {}
        computed = reference

        def reference(rows: NoisyRows, batch: PairBatch) -> torch.Tensor:
            if len(rows) not in kept:
                kept[len(rows)] = computed(rows, batch)
            return kept[len(rows)]

    loss = LossOptions(("sigmoid",), (1.0,), BETA)
    how = {"obstacle": engine.no_sync_obstacle(), "reduces_in_backward": engine.choice.reduces_in_backward}
    strategy, _ = choose_strategy("auto", segments=segments, shape=place, few=trains_few(engine.module), **how)
    return PreferenceStep(engine, reference, noise, loss, strategy=strategy, segments=segments), strategy


def score_difference(policy: nn.Module, spec: FamilySpec, batch: PairBatch, noise: NoiseOptions, device) -> float:
    """Largest relative difference of the two ways' row scores, same rows: they must be the same computation."""
    rows = noise.draw_rows(batch, device)
    ours_R = score_rows(MaskedLogProbs(policy, spec), rows, segments=Segments())
    with torch.no_grad():
        plain_R = plain_row_scores(policy, rows)
    return float(((ours_R - plain_R).abs() / plain_R.abs().clamp(min=1)).max())


# ------------------------------------------------------------------------------------------------- measuring


def model_flops(shape: Shape, noise: NoiseOptions, batch: PairBatch, *, reference: bool) -> float:
    """FLOPs of a step that a perfect implementation cannot avoid: see the module's docstring."""
    rows = noise.draw_rows(batch, torch.device("cpu"))
    tokens, squares = float(rows.lengths_R.sum()), float((rows.lengths_R.double() ** 2).sum())
    weights = shape.layers * (4 * shape.width**2 + 3 * shape.width * shape.mlp)
    one = (
        2 * weights * tokens
        + 4 * shape.layers * shape.width * squares
        + 2 * shape.width * shape.vocab * len(rows.row_M)
    )
    return one * (3 if reference else 2)


def peak_flops(device: torch.device, dtype: str) -> float:
    """FLOP/s of a large matrix product, best of several."""
    # on a CPU 1,024 is too small: 15 % below the rate of a step's own products
    size = 8192 if device.type == "cuda" else 2048
    a = torch.randn(size, size, device=device, dtype=getattr(torch, dtype))
    return 2 * size**3 / min(timed(lambda: a @ a, device) for _ in range(12))


def timed(run: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    run()
    if is_gpu(device):
        kind_of(device).synchronize(device)
    return time.perf_counter() - start


def compare(name: str, numbers: list[int], device: torch.device, repeats: int, warm_up: int) -> list[dict]:
    """One record a way; the ways take turns, so that a busy moment of the machine meets all of them."""
    shape = SHAPES[name]
    batch, peak = make_batch(shape), peak_flops(device, shape.dtype)
    ways: dict[str, tuple[Callable[[], object], int, float, str]] = {}
    difference = 0.0
    policy, spec = make_model(shape, device)
    segments = Segments(tokens=1)
    fit_segments(engine_of(copy.deepcopy(policy), spec), segments, place_of(shape, max(numbers)), fraction=MAX_MEMORY)
    for n in numbers:
        noise = {estimator: NoiseOptions(estimator, n, 0, shape.vocab - 1) for estimator in (OURS, FIELD)}
        difference = max(difference, score_difference(policy, spec, batch, noise[OURS], device))
        for precomputed, compiled in ((False, False), (False, True), (True, False), (True, True)):
            options = {"precomputed": precomputed, "compiled": compiled}
            step, strategy = our_step(copy.deepcopy(policy), spec, noise[OURS], shape, segments, **options)
            label = "ours, reference scores precomputed" if precomputed else "ours, reference = adapter off"
            label += ", compiled" if compiled else ""
            flops = model_flops(shape, noise[OURS], batch, reference=not precomputed)
            ways[f"{label} | {n}"] = (lambda step=step: step([batch], RATE), n, flops, strategy)
        plain = PlainStep(copy.deepcopy(policy), noise[FIELD], device)
        flops = model_flops(shape, noise[FIELD], batch, reference=True)
        ways[f"plain | {n}"] = (lambda plain=plain: plain(batch), n, flops, "one graph")
    seconds: dict[str, list[float]] = {key: [] for key in ways}
    for turn in range(warm_up + repeats):
        for key, (run, *_) in ways.items():
            taken = timed(run, device)
            if turn >= warm_up:
                seconds[key].append(taken)
    records = []
    for key, (_, n, flops, strategy) in ways.items():
        median = statistics.median(seconds[key])
        records.append(
            {
                "shape": name,
                "way": key.split(" | ")[0],
                "n": n,
                "strategy": strategy,
                "seconds": round(median, 5),
                "pairs_per_second": round(shape.pairs / median, 4),
                "utilisation": round(flops / median / peak, 4),
                "difference": difference,
            }
        )
    return records


def command_of(shape: str, args: argparse.Namespace) -> str:
    """What measures one shape as this run did: a table is put together from several."""
    flags = f"--shapes {shape} --numbers {args.numbers} --repeats {args.repeats} --warm_up {args.warm_up} --keep"
    return f"python benchmarks/throughput.py {flags}"


def made_by(records: list[dict]) -> str:
    """The commands that measured the records, and which were measured before commands were kept."""
    known = dict.fromkeys(r["command"] for r in records if "command" in r)
    unknown = dict.fromkeys(f"{r['shape']} (n = {r['n']})" for r in records if "command" not in r)
    commands = [f"`{command}`" for command in known]
    if unknown:
        commands.append(f"commands that were not recorded ({', '.join(unknown)})")
    return f"Measured by {', '.join(commands)}"


def table(records: list[dict], machine: str) -> str:
    lines = [
        "# Pairs per second with LoRA: ours against the plain step",
        "",
        f"{made_by(records)} on {machine}. Last column: ours at n = 4 against the plain "
        "step at n = 8. Utilisation: model FLOPs over the rate of a large matrix product.",
        "",
        "| shape | way | n | strategy | seconds a step | pairs/s | utilisation | faster, same n | n = 4 against 8 |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        plain = {b["n"]: b["seconds"] for b in records if b["shape"] == r["shape"] and b["way"] == "plain"}
        same_n = f"{plain[r['n']] / r['seconds']:.2f}"
        against_8 = f"{plain[8] / r['seconds']:.2f}" if r["n"] == 4 and r["way"] != "plain" and 8 in plain else ""
        cells = (r["shape"], r["way"], r["n"], r["strategy"], f"{r['seconds']:.3f}", f"{r['pairs_per_second']:.2f}")
        lines.append("| " + " | ".join(map(str, (*cells, f"{r['utilisation']:.0%}", same_n, against_8))) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--shapes", default=",".join(ON_GPU if device.type == "cuda" else ON_CPU))
    parser.add_argument("--numbers", default="4,8", help="values of n")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--warm_up", type=int, default=1, help="turns that are not counted")
    parser.add_argument("--keep", action="store_true", help="add to what stands in --output")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/benchmarks/throughput")
    args = parser.parse_args()
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    machine = f"{name}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    numbers = [int(n) for n in args.numbers.split(",")]
    records = json.loads(args.output.with_suffix(".json").read_text())["records"] if args.keep else []
    for name in args.shapes.split(","):  # written shape by shape: a long one may be broken off
        records = [r for r in records if r["shape"] != name or r["n"] not in numbers]
        made = {"command": command_of(name, args)}
        records += [record | made for record in compare(name, numbers, device, args.repeats, args.warm_up)]
        records.sort(key=lambda r: (list(SHAPES).index(r["shape"]), r["n"]))
        content = json.dumps({"machine": machine, "records": records}, indent=1) + "\n"
        args.output.with_suffix(".json").write_text(content)
        args.output.with_suffix(".md").write_text(table(records, machine))
    print(table(records, machine))


if __name__ == "__main__":
    main()
