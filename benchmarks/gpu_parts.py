"""The parts of benchmarks/gpu_evidence.py: each measures one thing and gives a JSON object with a `summary` in words.

A part that cannot be here says so under `left_out`.
"""

import copy
import traceback
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import throughput
from benchmarks.gpu_memory import full3b, qlora
from benchmarks.gpu_setting import Setting
from diffdpo.gpus import is_gpu
from diffdpo.memory.largest_fit import peak_of
from diffdpo.models.architecture.layout import Layout
from diffdpo.models.architecture.token_log_probs import token_log_probs
from diffdpo.optional import fault_of, in_a_line
from diffdpo.quiet import hush

REPEATS = 3
JUDGED = 64  # tokens whose scores are compared with float64


def machine(setting: Setting) -> dict[str, Any]:
    from diffdpo.doctor.examine import examine
    from diffdpo.doctor.software import begin_imports

    found = {subject: [asdict(one) for one in findings] for subject, findings in examine(begin_imports())}
    counts = [one["state"] for findings in found.values() for one in findings]
    name = torch.cuda.get_device_name() if setting.kind == "cuda" else "CPU"
    faults = {package: fault_of(package) for package in ("deepspeed", "bitsandbytes", "liger_kernel")}
    lacking = [fault for fault in faults.values() if fault] or ["no package is lacking"]
    summary = [name, f"torch {torch.__version__}", *lacking, f"{counts.count('error')} errors"]
    return {"summary": summary, "lacking": faults, "findings": found}


def self_test(setting: Setting) -> dict[str, Any]:
    from diffdpo.doctor.cases import CASES
    from diffdpo.doctor.self_test import FAILED, self_test

    cases = [case for case in CASES if not case.scorer.get("compile_blocks")]  # part `compiled` has these
    kinds = {(case.dtype, case.nf4, case.blocks): case for case in reversed(cases)}  # the first of each
    lines = list(self_test(setting.device, [c for c in cases if c in kinds.values()] if setting.tiny else cases))
    failed = [line.case for line in lines if line.state == FAILED]
    summary = [f"{len(lines) - len(failed)} of {len(lines)} passed or skipped", *(f"FAILED: {case}" for case in failed)]
    return {"summary": summary, "lines": [asdict(line) for line in lines]}


# ----------------------------------------------------------------------------------------------- speed


def speed(setting: Setting, *, compiled: bool = False) -> dict[str, Any]:
    """A step with LoRA: ours, layer checkpointing in one graph (TRL's way), one graph; ``compiled``: each of them."""
    name = "tiny" if setting.tiny else ("1b" if is_gpu(setting.device) else "small")
    shape, n = throughput.SHAPES[name], 4 if setting.tiny else 8
    batch, peak = throughput.make_batch(shape), throughput.peak_flops(setting.device, shape.dtype)
    policy, spec = throughput.make_model(shape, setting.device)
    noise = {kind: throughput.NoiseOptions(kind, n, 0, shape.vocab - 1) for kind in (throughput.OURS, throughput.FIELD)}
    segments = throughput.Segments(tokens=16384 if is_gpu(setting.device) else 4096)

    def ours() -> Callable[[], object]:
        options = {"precomputed": False, "compiled": compiled}
        step, _ = throughput.our_step(copy.deepcopy(policy), spec, noise[throughput.OURS], shape, segments, **options)
        return lambda: step([batch], 1e-5)

    def theirs(recompute: bool) -> Callable[[], object]:
        plain = throughput.PlainStep(
            copy.deepcopy(policy),
            noise[throughput.FIELD],
            setting.device,
            recompute=recompute,
            compiled=compiled,
        )
        return lambda: plain(batch)

    flops = throughput.model_flops(shape, noise[throughput.OURS], batch, reference=True)
    makers = {"ours": ours, "layer checkpointing": lambda: theirs(True), "one graph": lambda: theirs(False)}
    ways = {way: _timed(make, setting) for way, make in makers.items()}
    for found in ways.values():
        if found["seconds"]:
            found["pairs_per_second"] = shape.pairs / found["seconds"]
            found["utilisation"] = flops / found["seconds"] / peak
    summary = [
        f"{way} {found['pairs_per_second']:.2f} pairs/s, MFU {found['utilisation']:.0%}"
        if found["seconds"]
        else f"{way}: out of memory"
        for way, found in ways.items()
    ]
    return {"summary": [f"{name}, n = {n}", *summary], "shape": name, "n": n, "peak_flops": peak, "ways": ways}


def _timed(make: Callable[[], Callable[[], object]], setting: Setting) -> dict[str, Any]:
    """The quickest of some, and the device's peak; None where memory ran out."""
    try:
        run = make()
        run()
        held = peak_of(lambda: None, setting.device)
        seconds = [throughput.timed(run, setting.device) for _ in range(REPEATS)]
        return {"seconds": min(seconds), "peak_bytes": peak_of(run, setting.device) - held}
    except torch.OutOfMemoryError:
        return {"seconds": None}


def compiled(setting: Setting) -> dict[str, Any]:
    from diffdpo.errors import UserError

    try:
        return speed(setting, compiled=True)
    except UserError as fault:
        return {"left_out": str(fault)}


def head(setting: Setting) -> dict[str, Any]:
    """Scores and the gradient of hidden states under a frozen head, LLaDA's vocabulary."""
    tokens, width, vocabulary = (64, 64, 2048) if setting.tiny else (2048, 4096, 126464)
    dtype = torch.bfloat16 if is_gpu(setting.device) else torch.float32
    torch.manual_seed(0)
    hidden = torch.randn(tokens, width, dtype=dtype, device=setting.device, requires_grad=True)
    weight = torch.randn(vocabulary, width, dtype=dtype, device=setting.device) * 0.02
    target = torch.randint(0, vocabulary, (tokens,), device=setting.device)

    def matrix() -> torch.Tensor:
        return (hidden @ weight.T).float().log_softmax(-1).gather(-1, target[:, None]).squeeze(-1)

    few = hidden[:JUDGED].detach().double().cpu()  # all of them would take a host minutes
    exact = token_log_probs(few, weight.double().cpu(), target[:JUDGED].cpu(), logits_budget=None)
    ways = {"ours": lambda: token_log_probs(hidden, weight, target, logits_budget=None), "whole matrix": matrix}
    found = {}
    for way, scores in ways.items():
        off = float((scores().detach()[:JUDGED].cpu().double() - exact).abs().max())
        found[way] = _timed(lambda scores=scores: lambda: scores().sum().backward(), setting) | {"off": off}
    return {"summary": _in_words(found, "off by {off:.1e} nats"), "ways": found}


def attention(setting: Setting) -> dict[str, Any]:
    """Forward and backward of rows of unequal lengths, 32 heads of 128. Where the kernel for all of them at once is not
    (a CPU, fp32), `packed` goes row by row too."""
    lengths, heads, size = ([9, 5, 9], 2, 16) if setting.tiny else ([1024, 700, 512, 300, 801, 450, 1000, 640], 32, 128)
    dtype = torch.bfloat16 if is_gpu(setting.device) else torch.float32
    device = setting.device
    packed, padded = (build(lengths, max(lengths), device=device) for build in (Layout.packed, Layout.padded))
    alone = [Layout.packed([length], length, device=device) for length in lengths]
    ways: dict[str, Callable[..., torch.Tensor]] = {
        "packed": lambda *qkv: packed.attend(*qkv).sum(),
        "row by row": lambda *qkv: sum(
            each.attend(*parts).sum() for each, *parts in zip(alone, *(t.split(lengths) for t in qkv), strict=True)
        ),
        "padded": lambda *qkv: padded.attend(*qkv).sum(),
    }
    found = {}
    for way, total in ways.items():
        tokens = len(padded) if way == "padded" else sum(lengths)
        qkv = [torch.randn(tokens, heads, size, dtype=dtype, device=device, requires_grad=True) for _ in range(3)]
        found[way] = _timed(lambda total=total, qkv=qkv: lambda: total(*qkv).backward(), setting)
    return {"summary": _in_words(found, ""), "ways": found}


def _in_words(found: dict[str, dict[str, Any]], more: str) -> list[str]:
    return [
        f"{way} {1e3 * each['seconds']:.1f} ms {more.format(**each)}".strip()
        if each["seconds"]
        else f"{way}: no memory"
        for way, each in found.items()
    ]


PARTS: dict[str, Callable[[Setting], dict[str, Any]]] = {
    "machine": machine,
    "self_test": self_test,
    "qlora": qlora,
    "throughput": speed,
    "head": head,
    "attention": attention,
    "compiled": compiled,
    "full3b": full3b,
}


def found_by(part: str, setting: Setting) -> dict[str, Any]:
    """What a part gives; where it fails, ``error`` in a line, beside the traceback on the screen."""
    hush()
    fault_of("bitsandbytes")
    try:
        return PARTS[part](setting)
    except Exception as fault:
        traceback.print_exc()
        return {"error": in_a_line(fault)}
