"""Peak memory of a gradient against the number of forwards a score (n), per strategy, beside the plain way.

    python benchmarks/segment_memory.py                       # every strategy, full and LoRA, n = 2 .. 64
    python benchmarks/segment_memory.py --numbers 2,8 --strategies two_pass,deferred --trained LoRA --keep

One pair a step, n rows an answer. "plain" is the obvious way: all rows in one padded batch, logits of every position,
log-softmax, gather, one graph. The peak of a step (noise, reference scores, policy scores, gradients; without the
optimizer's update) is measured above weights and reference: on a GPU by torch's allocator; on the CPU, where torch's
allocator keeps no count, by a dispatch mode that sees every tensor come and go. What it does not see is the work space
inside single kernels, and what the C library loses to fragmentation.

What a first segment holds is no measure: no gradient stands beside its activations yet. So segments have one row, and
every answer takes several at every n. The head's budget is below the logits of most rows, as it is for large models
(256 MiB are 530 tokens of LLaDA-8B): otherwise the worst of 128 rows, which has more masked tokens than the worst of 4,
would show as growth. Small n take steps of a pair each until 8 rows are drawn, of which the worst counts.
Writes docs/benchmarks/segment_memory.{json,md}.
"""

import argparse
import gc
import json
import platform
import time
import weakref
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import TokenAnswer, TokenPair
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.losses.options import LossOptions
from diffdpo.models.architecture.backbone import native
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
from diffdpo.models.architecture.spec import LLADA_LORA_TARGETS, FamilySpec
from diffdpo.models.lora.adapters import add_lora
from diffdpo.noise.options import NoiseOptions
from diffdpo.noise.rows import NoisyRows
from diffdpo.scores.fold import row_scores
from diffdpo.scores.masked_log_probs import MaskedLogProbs, TokenCount
from diffdpo.scores.reference import adapter_off_reference, copy_reference, frozen_copy
from diffdpo.scores.segments import Segments
from diffdpo.step.step import PreferenceStep

MIB = 2**20
DRAWN_ROWS = 8  # at least, over the steps of a point
OUTPUT = Path(__file__).parents[1] / "docs/benchmarks/segment_memory"
LOGITS_BUDGET = 2**18  # 16 tokens at the vocabulary below
LORA_RANK = 8
STRATEGIES = ("plain", "none", "checkpoint", "two_pass", "two_pass + layers", "deferred", "deferred + layers")


@dataclass(frozen=True)
class Point:
    """One measurement."""

    strategy: str
    trained: str  # all or LoRA
    n: int
    width: int
    layers: int
    vocab: int
    length: int
    segment_rows: int


class AllLogits(torch.nn.Module):
    """The plain way to the log-probabilities of the masked tokens: logits of everything, in one padded batch."""

    def __init__(self, model: torch.nn.Module):
        super().__init__()
        self.model, self.counted = model, TokenCount()

    def forward(self, ids_RT, lengths_R, row_M, position_M, target_M) -> torch.Tensor:
        visible_RT = torch.arange(ids_RT.shape[1], device=ids_RT.device) < lengths_R[:, None]
        logp_RTV = self.model(ids_RT, attention_mask=visible_RT.long()).logits.float().log_softmax(-1)
        return logp_RTV[row_M, position_M, target_M]


class PlainReference:
    """The reference of the plain way: a second model, all rows at once."""

    def __init__(self, module: torch.nn.Module):
        self.module = module

    @torch.no_grad()
    def __call__(self, rows: NoisyRows, batch: PairBatch) -> torch.Tensor:
        return row_scores(
            self.module(rows.input_ids_RT, rows.lengths_R, rows.row_M, rows.position_M, rows.target_M), rows
        )


def make_step(point: Point, device: torch.device) -> PreferenceStep:
    """A step under the plain engine whose update does nothing."""
    config = LLaDAConfig.create(
        d_model=point.width,
        n_layers=point.layers,
        n_heads=point.width // 32,
        mlp_hidden_size=4 * point.width,
        vocab_size=point.vocab,
        mask_token_id=point.vocab - 1,
        eos_token_id=0,
        pad_token_id=0,
    )
    torch.manual_seed(0)
    spec = FamilySpec("llada", point.vocab - 1, 0, 0, "LLaDABlock", LLADA_LORA_TARGETS)
    model: torch.nn.Module = LLaDAModelLM(config)
    if point.trained == "LoRA":
        model = add_lora(model, spec, r=LORA_RANK)
    strategy, _, layers = point.strategy.partition(" + ")
    plain = strategy == "plain"
    module: torch.nn.Module = AllLogits(model)
    if not plain:
        module = MaskedLogProbs(model, spec, layer_checkpointing=bool(layers), logits_budget=LOGITS_BUDGET)
    frozen = frozen_copy(AllLogits(native(model)) if plain else module)
    engine = PlainEngine(module, World(0, 0, 1, device), OptimizerOptions(learning_rate=0.0))
    engine.step = lambda learning_rate: engine.abort_step() or 0.0  # type: ignore[method-assign,func-returns-value]
    segments = Segments(rows=point.segment_rows)
    if plain:
        reference = PlainReference(frozen.to(device))
    elif point.trained == "LoRA":
        reference = adapter_off_reference(engine, module.model, segments=segments)
    else:
        reference = copy_reference(engine, frozen, segments=segments)
    noise = NoiseOptions("balanced", point.n, 0, spec.mask_token_id)
    loss = LossOptions(("sigmoid",), (1.0,), beta=0.1)
    strategy = "none" if plain else strategy
    return PreferenceStep(engine, reference, noise, loss, strategy=strategy, segments=segments)


def batch_of(point: Point, index: int) -> PairBatch:
    """A pair whose answers are half of the row."""
    ids = np.random.default_rng(index).integers(2, point.vocab - 1, (2, point.length)).astype(np.int32)
    pair = TokenPair(f"pair {index}", *(TokenAnswer(row, point.length // 2) for row in ids))
    return collate([pair], pad_id=0, epoch=0, step=0, micro=0, last_micro=True)


class LiveBytes(TorchDispatchMode):
    """Bytes of the tensors made inside it that live, and their ``peak``."""

    def __init__(self) -> None:
        super().__init__()
        self.known: dict[int, int] = {}
        self.total = self.peak = 0

    def given(self, module: torch.nn.Module) -> None:
        """Weights: there before."""
        self.known |= {tensor.untyped_storage()._cdata: 0 for tensor in (*module.parameters(), *module.buffers())}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in () if func.is_view else tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known:
                    self.known[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self._drop, storage._cdata)
                    self.total += storage.nbytes()
                    self.peak = max(self.peak, self.total)
        return out

    def _drop(self, key: int) -> None:
        self.total -= self.known.pop(key)


def measure(point: Point) -> dict[str, float]:
    """Peak MiB of a step, and its seconds of CPU time (wall time on a GPU; the first step warms up there)."""
    gc.collect()
    cuda = torch.cuda.is_available()
    step = make_step(point, torch.device("cuda" if cuda else "cpu"))
    batches = [batch_of(point, index) for index in range(max(1, DRAWN_ROWS // (2 * point.n)))]
    peaks, seconds = [], []
    for batch in batches[:1] * cuda + batches:
        run = _on_gpu if cuda else _on_cpu
        peak, taken = run(step, batch)
        peaks.append(peak)
        seconds.append(taken)
    return {"peak_mib": max(peaks) / MIB, "seconds": seconds[-1]}


def _on_gpu(step: PreferenceStep, batch: PairBatch) -> tuple[int, float]:
    torch.cuda.reset_peak_memory_stats()
    before, started = torch.cuda.memory_allocated(), time.perf_counter()
    step([batch], 0.0)
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, time.perf_counter() - started


def _on_cpu(step: PreferenceStep, batch: PairBatch) -> tuple[int, float]:
    live, started = LiveBytes(), time.process_time()
    live.given(step.engine.module)
    with live:
        step([batch], 0.0)
    return live.peak, time.process_time() - started


def table(records: list[dict], machine: str) -> str:
    """Markdown: MiB by n, and the growth from the first n to the last."""
    numbers = sorted({record["n"] for record in records})
    found = {(r["trained"], r["strategy"], r["n"]): r for r in records}
    first = records[0]
    lines = [
        "# Peak memory against n",
        "",
        f"`python benchmarks/segment_memory.py` on {machine}. {first['layers']} layers of width {first['width']}, "
        f"vocabulary {first['vocab']}, rows of {first['length']} tokens, {first['segment_rows']} row(s) a segment, "
        "one pair a step. MiB of live tensors above weights and reference, gradients included, the optimizer's update "
        "not; seconds of CPU time include the counting.",
        "",
        f"| trained | strategy | {' | '.join(f'n = {n}' for n in numbers)} | growth | seconds, largest n |",
        "|---|---|" + "---|" * (len(numbers) + 2),
    ]
    for trained, strategy in dict.fromkeys((r["trained"], r["strategy"]) for r in records):
        row = [found.get((trained, strategy, n)) for n in numbers]
        measured = [record for record in row if record]
        growth = measured[-1]["peak_mib"] / measured[0]["peak_mib"] - 1
        peaks = " | ".join(f"{record['peak_mib']:.1f}" if record else "" for record in row)
        lines.append(f"| {trained} | {strategy} | {peaks} | {growth:+.1%} | {measured[-1]['seconds']:.1f} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--numbers", default="2,4,8,16,32,64", help="values of n")
    parser.add_argument("--strategies", default=",".join(STRATEGIES))
    parser.add_argument("--trained", default="all,LoRA")
    for name, value in {"width": 128, "layers": 12, "vocab": 4096, "length": 128, "segment_rows": 1}.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--output", type=Path, default=OUTPUT, help="without suffix")
    parser.add_argument("--keep", action="store_true", help="do not measure again what stands in --output")
    args = parser.parse_args()
    shape = {name: getattr(args, name) for name in ("width", "layers", "vocab", "length", "segment_rows")}
    file = args.output.with_suffix(".json")
    records = json.loads(file.read_text())["points"] if args.keep else []
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()} CPU"
    machine = f"{device}, {torch.get_num_threads()} thread(s), torch {torch.__version__}"
    for trained in args.trained.split(","):
        for strategy in args.strategies.split(","):
            for n in map(int, args.numbers.split(",")):
                point = Point(strategy, trained, n, **shape)
                if any(asdict(point).items() <= record.items() for record in records):
                    continue
                records.append(asdict(point) | measure(point))
                print(f"{trained:5} {strategy:18} n = {n:3} {records[-1]['peak_mib']:9.1f} MiB", flush=True)
                # point by point: a long run may be broken off
                records.sort(key=lambda r: (r["trained"] == "LoRA", STRATEGIES.index(r["strategy"]), r["n"]))
                file.write_text(json.dumps({"machine": machine, "points": records}, indent=1) + "\n")
                args.output.with_suffix(".md").write_text(table(records, machine))
    print(table(records, machine))


if __name__ == "__main__":
    main()
