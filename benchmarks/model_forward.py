"""Masked log-probabilities: this package's forward against the obvious one, same weights, same rows, in one run.

    python benchmarks/model_forward.py                       # the shapes that suit this device
    python benchmarks/model_forward.py --shapes small --trained LoRA --compile --keep   # add to the table there is

The obvious way: pad every row to the longest, eager attention with a mask, RMS norm and rotary positions written out,
logits of every position in fp32, log-softmax, gather. Both give the same numbers (checked first, `difference`).
Times are medians of process (CPU) or wall time (GPU); memory is the peak above what stood before the call.
Writes docs/benchmarks/model_forward.{json,md}.
"""

import argparse
import ctypes
import gc
import json
import platform
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from diffdpo.models.architecture.backbone import native
from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
from diffdpo.models.architecture.spec import LLADA_LORA_TARGETS, FamilySpec
from diffdpo.models.lora.adapters import add_lora
from diffdpo.scores.masked_log_probs import MaskedLogProbs


@dataclass(frozen=True)
class Shape:
    """A model of LLaDA's layout and the rows it scores: lengths between `shortest` and `longest`, half a prompt."""

    width: int
    layers: int
    heads: int
    mlp: int
    vocab: int
    rows: int
    shortest: int
    longest: int
    dtype: str = "float32"


SHAPES = {
    "tiny": Shape(192, 4, 4, 512, 512, 32, 40, 100),
    "small": Shape(512, 8, 8, 1408, 8192, 16, 64, 256),
    "small_llada_vocab": Shape(256, 4, 4, 704, 126464, 8, 64, 256),
    "1b": Shape(2048, 16, 16, 5632, 126464, 8, 256, 1024, "bfloat16"),
    "8b": Shape(4096, 32, 32, 12288, 126464, 8, 256, 1024, "bfloat16"),
}
ON_CPU, ON_GPU = ("tiny", "small", "small_llada_vocab"), ("tiny", "small", "1b", "8b")


def build(shape: Shape, device: str, lora: bool) -> tuple[torch.nn.Module, FamilySpec]:
    """Random weights on the device, all trained or with LoRA on every block."""
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
    torch.set_default_dtype(getattr(torch, shape.dtype))
    with torch.device(device):
        model = LLaDAModelLM(config)
    torch.set_default_dtype(torch.float32)
    return (add_lora(model, spec, r=16) if lora else model), spec


def rows(shape: Shape, device: str) -> tuple[torch.Tensor, ...]:
    """Rows of several lengths whose second half is the answer, a uniform number of its tokens masked."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(shape.shortest, shape.longest, shape.rows).long()
    ids = torch.randint(1, shape.vocab - 1, (shape.rows, shape.longest), generator=generator)
    row, position = [], []
    for r, length in enumerate(lengths.tolist()):
        answer = length - length // 2
        count = 1 + r * (answer - 1) // max(1, shape.rows - 1)
        chosen = length // 2 + torch.randperm(answer, generator=generator)[:count]
        row.append(torch.full((count,), r))
        position.append(chosen)
    row, position = torch.cat(row), torch.cat(position)
    target = ids[row, position].clone()
    ids[row, position] = shape.vocab - 1
    return tuple(t.to(device) for t in (ids, lengths, row, position, target))


def obvious(model: torch.nn.Module, ids, lengths, row, position, target) -> torch.Tensor:
    """The same log-probabilities with nothing left out and nothing fused."""
    base = native(model)
    size = base.config.d_model // base.config.n_heads
    columns = torch.arange(ids.shape[1], device=ids.device)
    hidden_keys = (columns >= lengths[:, None])[:, None, None, :]
    frequency = 1.0 / base.config.rope_theta ** (torch.arange(0, size, 2, device=ids.device).float() / size)
    angle = torch.outer(columns.float(), frequency).repeat(1, 2)
    cos, sin = angle.cos(), angle.sin()

    def norm(module, x):
        wide = x.float()
        return module.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + module.eps)).to(x.dtype)

    def heads(x):
        return x.unflatten(-1, (-1, size)).transpose(1, 2)

    def rotate(x):
        first, second = x.float().chunk(2, dim=-1)
        return (x.float() * cos + torch.cat((-second, first), dim=-1) * sin).to(x.dtype)

    x = base.embed(ids)
    for block in base.blocks:
        h = norm(block.attn_norm, x)
        q, k, v = rotate(heads(block.q_proj(h))), rotate(heads(block.k_proj(h))), heads(block.v_proj(h))
        weights = (q @ k.transpose(-1, -2) * size**-0.5).masked_fill(hidden_keys, -torch.inf).float().softmax(-1)
        x = x + block.attn_out((weights.to(v.dtype) @ v).transpose(1, 2).flatten(2))
        h = norm(block.ff_norm, x)
        x = x + block.ff_out(F.silu(block.ff_proj(h)) * block.up_proj(h))
    logits = base.head(norm(base.final_norm, x)).float()
    return logits.log_softmax(-1)[row, position].gather(-1, target[:, None]).squeeze(-1)


def measure(run, device: str, repeats: int) -> dict:
    """Median seconds, and the peak memory above what stood before (MiB)."""
    clock = time.perf_counter if device == "cuda" else time.process_time
    run()
    before = reset_peak(device)
    run()
    peak = read_peak(device) - before
    seconds = []
    for _ in range(repeats):
        start = clock()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(clock() - start)
    return {"seconds": round(statistics.median(seconds), 5), "peak_mib": round(peak / 2**20, 1)}


def reset_peak(device: str) -> int:
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    return status_bytes("VmRSS")


def read_peak(device: str) -> int:
    return torch.cuda.max_memory_allocated() if device == "cuda" else status_bytes("VmHWM")


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def compare(shape: Shape, device: str, *, lora: bool, compiled: bool, repeats: int) -> list[dict]:
    """One record for each way and each of forward, forward + backward."""
    model, spec = build(shape, device, lora)
    batch = rows(shape, device)
    scorer = MaskedLogProbs(model, spec)
    ways = {"ours": lambda: scorer(*batch), "obvious": lambda: obvious(model, *batch)}
    with torch.no_grad():
        difference = (ways["ours"]() - ways["obvious"]()).abs().max().item()
    if compiled:
        for block in native(model).blocks:
            block.compile(dynamic=True)
        ways = {"ours, compiled": ways["ours"]}

    def forward(way):
        with torch.no_grad():
            way()

    def both(way):
        for parameter in model.parameters():
            parameter.grad = None
        way().sum().backward()

    records = []
    for name, way in ways.items():
        for what, step in (("forward", forward), ("forward + backward", both)):
            record = {"way": name, "what": what, "trained": "LoRA" if lora else "all", "difference": difference}
            records.append(record | measure(lambda step=step, way=way: step(way), device, repeats))
    return records


def table(records: list[dict], machine: str) -> str:
    lines = [
        "# Forward of the scores: ours against the obvious way",
        "",
        f"`python benchmarks/model_forward.py --compile` on {machine}. Peak: MiB above what stood before the call.",
        "",
        "| shape | trained | what | way | seconds | peak MiB | times faster | memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for r in records:
        same = ("shape", "trained", "what")
        base = next(b for b in records if b["way"] == "obvious" and all(b[key] == r[key] for key in same))
        speed, memory = base["seconds"] / r["seconds"], r["peak_mib"] / max(base["peak_mib"], 0.1)
        cells = (r["shape"], r["trained"], r["what"], r["way"], f"{r['seconds']:.4f}", f"{r['peak_mib']:.0f}")
        lines.append("| " + " | ".join((*cells, f"{speed:.2f}", f"{memory:.0%}")) + " |")
    largest = max(r["difference"] for r in records)
    lines += ["", f"Largest difference of a log-probability between the two ways: {largest:.1e}."]
    if "CPU" in machine:
        lines += [
            "Process time; resident memory, with what the C allocator holds back: LoRA's short-lived sums make it hold",
            "more, although no more is kept for the backward.",
        ]
    return "\n".join(lines) + "\n"


def merged(before: dict, machine: str, records: list[dict]) -> list[dict]:
    """The records of an earlier call on this machine, those measured again replaced, in the order of the shapes."""
    if before["machine"] != machine:
        raise SystemExit(f"the output was measured on {before['machine']}, this is {machine}: leave --keep out")

    def key(record: dict) -> tuple:
        return list(SHAPES).index(record["shape"]), record["trained"], record["way"], record["what"]

    found = {key(record): record for record in (*before["records"], *records)}
    return [found[place] for place in sorted(found)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    device = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--shapes", default=",".join(ON_GPU if device == "cuda" else ON_CPU))
    parser.add_argument("--trained", default="all,LoRA", help="all, LoRA or both with a comma")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", action="store_true", help="also with torch.compile on every block")
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/benchmarks/model_forward")
    parser.add_argument("--keep", action="store_true", help="keep what the output holds of other shapes and ways")
    args = parser.parse_args()
    records: list[dict] = []
    for name in args.shapes.split(","):
        for trained in args.trained.split(","):
            lora = trained == "LoRA"
            if name == "8b" and not lora:
                continue  # 8B gradients and weights alone are 32 GB
            for compiled in (False, True) if args.compile else (False,):
                found = compare(SHAPES[name], device, lora=lora, compiled=compiled, repeats=args.repeats)
                records += [{"shape": name} | record for record in found]
                print(json.dumps(records[-len(found) :]), flush=True)
    threads = torch.get_num_threads()
    name = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, {threads} thread(s)"
    machine = f"{name}, torch {torch.__version__}"
    if args.keep:
        records = merged(json.loads(args.output.with_suffix(".json").read_text()), machine, records)
    args.output.with_suffix(".json").write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(records, machine))
    print(table(records, machine))


if __name__ == "__main__":
    main()
