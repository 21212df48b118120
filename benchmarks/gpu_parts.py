"""The parts of benchmarks/gpu_evidence.py: each measures one thing and gives a JSON object with a `summary` in words.

A part that cannot be here says so under `left_out`.
"""

import copy
import importlib.util
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import throughput
from diffdpo.cli.flags import parse_config, read_recipe
from diffdpo.config import TrainConfig, make_config
from diffdpo.gpus import is_gpu
from diffdpo.memory.largest_fit import peak_of
from diffdpo.models.architecture.layout import Layout
from diffdpo.models.architecture.spec import LLADA_LORA_TARGETS, FamilySpec
from diffdpo.models.architecture.token_log_probs import token_log_probs

ROOT = Path(__file__).parents[1]
GIB = 2**30
CARD = 16 * GIB
REPEATS = 3


@dataclass(frozen=True)
class Setting:
    """Where the parts run; ``tiny``: on shapes that show whether they work."""

    kind: str
    tiny: bool

    @property
    def device(self) -> torch.device:
        return torch.device(self.kind, 0) if self.kind == "cuda" else torch.device("cpu")

    def of_16_gb(self) -> None:
        """From here on this process has no more of the GPU than such a card, of which the context takes a GiB."""
        if self.kind == "cuda":
            total = torch.cuda.get_device_properties(0).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, (CARD - GIB) / total))


def machine(setting: Setting) -> dict[str, Any]:
    from diffdpo.doctor.examine import examine

    found = {subject: [asdict(one) for one in findings] for subject, findings in examine()}
    counts = [one["state"] for findings in found.values() for one in findings]
    name = torch.cuda.get_device_name() if setting.kind == "cuda" else "CPU"
    packages = {p: importlib.util.find_spec(p) is not None for p in ("deepspeed", "bitsandbytes", "liger_kernel")}
    absent = ", ".join(p for p, there in packages.items() if not there) or "none"
    summary = [name, f"torch {torch.__version__}", f"absent: {absent}", f"{counts.count('error')} errors"]
    return {"summary": summary, "packages": packages, "findings": found}


def self_test(setting: Setting) -> dict[str, Any]:
    from diffdpo.doctor.cases import CASES
    from diffdpo.doctor.self_test import FAILED, self_test

    cases = [case for case in CASES if not case.scorer.get("compile_blocks")]  # part `compiled` has these
    lines = list(self_test(setting.device, cases[:2] if setting.tiny else cases))
    failed = [line.case for line in lines if line.state == FAILED]
    summary = [f"{len(lines) - len(failed)} of {len(lines)} passed or skipped", *(f"FAILED: {case}" for case in failed)]
    return {"summary": summary, "lines": [asdict(line) for line in lines]}


# ----------------------------------------------------------------------------------------------- memory against plan

TINY_8B = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 128, "vocab_size": 512}
TINY_8B |= {"embedding_size": 512, "mask_token_id": 511, "eos_token_id": 1, "pad_token_id": 1}


def qlora(setting: Setting) -> dict[str, Any]:
    """A step of recipes/llada8b_qlora.yaml on one pair of the greatest length, by the plain engine."""
    if importlib.util.find_spec("bitsandbytes") is None:
        return {"left_out": "bitsandbytes is not installed"}
    setting.of_16_gb()
    with tempfile.TemporaryDirectory() as folder:
        config, shape = _shape(setting, Path(folder))
        planned = _planned(config, setting)
        measured = _measured(config, shape, setting)
    total = sum(measured[name] for name in ("weights", "live"))
    plan = planned["weights"] + planned["live"]
    summary = [
        f"weights {_size(measured['weights'])} (planned {_size(planned['weights'])})",
        f"a step above them {_size(measured['live'])} (planned {_size(planned['live'])})",
        f"together {_size(total)} (planned {_size(plan)})",
        f"{measured['seconds']:.1f} s a pair, |h| of the first step {measured['largest_logit']:.1e}",
    ]
    return {"summary": summary, "planned": planned, "measured": measured}


def _size(count: int) -> str:
    return f"{count / GIB:.2f} GiB" if count > GIB / 10 else f"{count / 2**20:.1f} MiB"


def _shape(setting: Setting, folder: Path) -> tuple[TrainConfig, dict[str, Any]]:
    shape = json.loads((ROOT / "docs/shapes/llada8b.json").read_text()) | (TINY_8B if setting.tiny else {})
    (folder / "config.json").write_text(json.dumps(shape))
    recipe = read_recipe(TrainConfig, ROOT / "recipes/llada8b_qlora.yaml")
    lengths = {"max_length": 64, "max_prompt_length": 32} if setting.tiny else {}
    own = {"model_name_or_path": str(folder / "config.json"), "bf16": True, "engine": "plain", **lengths}
    return make_config(TrainConfig, recipe | own), shape


def _planned(config: TrainConfig, setting: Setting) -> dict[str, Any]:
    """Bytes by part; ``weights`` and ``live`` are their sums."""
    from diffdpo.planner.hardware import GPUS, Host
    from diffdpo.planner.memory import DEVICE
    from diffdpo.planner.plan import Machine, make_plan

    made = make_plan(config, Machine(GPUS["RTX 4080"], Host(64 * GIB)), cuda=setting.kind == "cuda", timed=False)
    parts = [part for part in made.parts if part.place == DEVICE and not part.assumed]
    weights = sum(part.bytes for part in parts if part.name == "weights")
    live = sum(part.bytes for part in parts if "backward" in part.moments) - weights
    return {"weights": weights, "live": live, "parts": [asdict(part) for part in made.parts]}


def _measured(config: TrainConfig, shape: dict[str, Any], setting: Setting) -> dict[str, Any]:
    step, batch, module = _qlora_step(config, shape, setting)
    held = torch.cuda.memory_allocated() if setting.kind == "cuda" else _bytes_of(module)
    reports: list[Any] = []
    times: list[float] = []

    def work() -> None:
        start = time.perf_counter()
        reports.append(step([batch], 1e-5))
        if setting.kind == "cuda":
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)

    work()  # kernels are chosen, optimizer's moments made
    before = peak_of(lambda: None, setting.device)
    peak = peak_of(work, setting.device)
    exact = torch.cuda.max_memory_allocated() - held if setting.kind == "cuda" else peak - before
    return {
        "weights": held,
        "live": exact,
        "reserved": peak,
        "seconds": min(times),
        "largest_logit": reports[0].largest_logit,
        "strategy": step.strategy,
    }


def _bytes_of(module: nn.Module) -> int:
    extra = [getattr(p, "quant_state", None) for p in module.parameters()]
    states = [t for state in extra if state is not None for t in (state.absmax, getattr(state.state2, "absmax", None))]
    return sum(t.nbytes for t in (*module.parameters(), *states) if t is not None)


def _qlora_step(config: TrainConfig, shape: dict[str, Any], setting: Setting):
    """Random weights of the real shape, quantised one by one on the device."""
    from diffdpo.engine.choice import PLAIN, EngineChoice
    from diffdpo.engine.optimizer import OptimizerOptions
    from diffdpo.engine.plain import PlainEngine
    from diffdpo.engine.world import World
    from diffdpo.models.architecture.llada import LLaDAConfig, LLaDAModelLM
    from diffdpo.models.checkpoint.nf4 import expect_nf4
    from diffdpo.models.checkpoint.weights import set_parameter
    from diffdpo.models.lora.adapters import add_lora
    from diffdpo.noise.options import NoiseOptions
    from diffdpo.scores.masked_log_probs import MaskedLogProbs
    from diffdpo.scores.reference import adapter_off_reference
    from diffdpo.scores.segments import Segments
    from diffdpo.step.step import PreferenceStep

    with torch.device("meta"):
        model: Any = LLaDAModelLM(LLaDAConfig.from_dict(shape))
    expect_nf4(model, torch.bfloat16)
    for name, parameter in list(model.named_parameters()):
        value = torch.empty(parameter.shape, dtype=torch.bfloat16, device=setting.device).normal_(0, 0.02)
        set_parameter(model, name, value if parameter.dim() > 1 else torch.ones_like(value))
    model.tie_weights()
    ids = shape["mask_token_id"], shape["eos_token_id"], shape["pad_token_id"]
    spec = FamilySpec("llada", *ids, "LLaDABlock", LLADA_LORA_TARGETS)
    adapted = add_lora(model, spec, r=config.lora_r, alpha=config.lora_alpha)
    module = MaskedLogProbs(adapted, spec, layer_checkpointing=config.gradient_checkpointing)
    choice = EngineChoice(PLAIN, 1, True)
    engine = PlainEngine(module, World(0, 0, 1, setting.device), OptimizerOptions(1e-5), choice=choice)
    segments = Segments(rows=config.segment_rows)
    noise = NoiseOptions("mask_count", config.num_mc_samples, 0, ids[0])
    reference = adapter_off_reference(engine, adapted, segments)
    step = PreferenceStep(engine, reference, noise, config.loss(), strategy="deferred", segments=segments)
    longest = config.max_length - config.max_prompt_length
    sizes = {"prompt": config.max_prompt_length, "answer": longest, "max_length": config.max_length, "pairs": 1}
    plain = throughput.Shape(0, 0, 0, 0, ids[0], **sizes)
    return step, throughput.make_batch(replace(plain), spread=0.0), module


def full3b(setting: Setting) -> dict[str, Any]:
    """benchmarks/plan_check.py's way on this device: the public command on random weights, its own peak."""
    if importlib.util.find_spec("deepspeed") is None:
        return {"left_out": "deepspeed is not installed"}
    if setting.kind != "cuda" and not setting.tiny:
        return {"left_out": "3B on a CPU takes hours; --tiny shows that the part works"}
    with tempfile.TemporaryDirectory() as folder:
        model = _random_folder(Path(folder) / "model", setting)
        ds = ROOT / "ds_configs" / ("4080_offload.json" if setting.kind == "cuda" else "4080_qlora.json")
        flags = [
            "--model_name_or_path",
            str(model),
            "--config",
            str(ROOT / "recipes/full3b.yaml"),
            "--ds_config",
            str(ds),
        ]
        flags += ["--max_steps", "2", "--gradient_accumulation_steps", "1", "--num_generated_pairs", "16"]
        flags += ["--max_eval_pairs", "1", "--num_eval_problems", "0", "--tracking_uri", "none", "--save_steps", "0"]
        flags += ["--bf16", str(setting.kind == "cuda").lower(), "--output_dir", f"{folder}/run"]
        done = subprocess.run(
            [sys.executable, "-m", "diffdpo", "train", *flags], cwd=folder, capture_output=True, text=True
        )
        if done.returncode:
            raise RuntimeError(done.stdout[-1500:] + done.stderr[-1500:])
        config = parse_config(TrainConfig, flags, "")
        planned = _planned(config, setting)
        lines = [json.loads(line) for line in Path(f"{folder}/run/metrics.jsonl").read_text().splitlines()]
        last = [line for line in lines if "loss" in line][-1]
    seconds, peak = last["step_seconds"], last["peak_memory_gib"]
    plan = (planned["weights"] + planned["live"]) / GIB
    summary = [f"peak of tensors {peak:.2f} GiB (planned {plan:.2f})", f"{seconds:.1f} s a pair"]
    return {"summary": summary, "step_seconds": seconds, "peak_gib": peak, "planned": planned}


def _random_folder(folder: Path, setting: Setting) -> Path:
    """A model of docs/shapes/qwen3b.json's size (LLaDA's layout) with the bundled tokenizer."""
    from diffdpo.models.architecture.from_scratch import new_model
    from diffdpo.models.bundled import BUNDLED_MODEL
    from diffdpo.models.load import load_tokenizer, save_model

    width, layers, heads = (32, 2, 2) if setting.tiny else (2560, 36, 20)
    tokenizer: Any = load_tokenizer(str(BUNDLED_MODEL))
    model = new_model(tokenizer, width=width, layers=layers, heads=heads, seed=0, max_length=1024)
    save_model(model.to(torch.bfloat16), tokenizer, folder)
    return folder


# ----------------------------------------------------------------------------------------------- speed


def speed(setting: Setting, *, compiled: bool = False) -> dict[str, Any]:
    """A step with LoRA: ours, layer checkpointing in one graph (TRL's way), one graph."""
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
            copy.deepcopy(policy), noise[throughput.FIELD], setting.device, recompute=recompute
        )
        return lambda: plain(batch)

    flops = throughput.model_flops(shape, noise[throughput.OURS], batch, reference=True)
    makers = {"ours": ours}
    if not compiled:
        makers |= {"layer checkpointing": lambda: theirs(True), "one graph": lambda: theirs(False)}
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

    exact = token_log_probs(hidden.detach().double().cpu(), weight.double().cpu(), target.cpu(), logits_budget=None)
    ways = {"ours": lambda: token_log_probs(hidden, weight, target, logits_budget=None), "whole matrix": matrix}
    found = {}
    for way, scores in ways.items():
        off = float((scores().detach().cpu().double() - exact).abs().max())
        found[way] = _timed(lambda scores=scores: lambda: scores().sum().backward(), setting) | {"off": off}
    return {"summary": _in_words(found, "off by {off:.1e} nats"), "ways": found}


def attention(setting: Setting) -> dict[str, Any]:
    """Forward and backward of rows of unequal lengths, 32 heads of 128."""
    lengths, heads, size = ([9, 5, 9], 2, 16) if setting.tiny else ([1024, 700, 512, 300, 801, 450, 1000, 640], 32, 128)
    dtype = torch.bfloat16 if is_gpu(setting.device) else torch.float32
    layouts = {
        "packed": Layout.packed(lengths, max(lengths), device=setting.device),
        "padded": Layout.padded(lengths, max(lengths), device=setting.device),
    }
    found = {}
    for way, layout in layouts.items():
        qkv = [
            torch.randn(len(layout), heads, size, dtype=dtype, device=setting.device, requires_grad=True)
            for _ in range(3)
        ]
        found[way] = _timed(lambda layout=layout, qkv=qkv: lambda: layout.attend(*qkv).sum().backward(), setting)
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
