"""Planned against measured memory, for benchmarks/gpu_evidence.py: the two profiles of a 16 GB card."""

import json
import tempfile
import time
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import throughput
from benchmarks.gpu_setting import GIB, Setting
from diffdpo.cli.flags import parse_config, read_recipe
from diffdpo.config import TrainConfig, make_config
from diffdpo.gpus import is_gpu
from diffdpo.memory.largest_fit import peak_of
from diffdpo.memory.peak import peak_memory_gib
from diffdpo.models.architecture.spec import LLADA_LORA_TARGETS, FamilySpec
from diffdpo.optional import fault_of
from diffdpo.training.callbacks import Callback

ROOT = Path(__file__).parents[1]
TINY_8B = {"d_model": 64, "n_layers": 2, "n_heads": 4, "n_kv_heads": 4, "mlp_hidden_size": 128, "vocab_size": 512}
TINY_8B |= {"embedding_size": 512, "mask_token_id": 511, "eos_token_id": 1, "pad_token_id": 1}


def qlora(setting: Setting) -> dict[str, Any]:
    """A step of recipes/llada8b_qlora.yaml on one pair of the greatest length, by the plain engine."""
    if fault := fault_of("bitsandbytes"):
        return {"left_out": fault}
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


def _plan(config: TrainConfig, setting: Setting) -> list[Any]:
    """The parts that are tensors, without margins."""
    from diffdpo.planner.hardware import GPUS, Host
    from diffdpo.planner.plan import Machine, make_plan

    made = make_plan(config, Machine(GPUS["RTX 4080"], Host(128 * GIB)), cuda=setting.kind == "cuda", timed=False)
    return [part for part in made.parts if not part.assumed]


def _planned(config: TrainConfig, setting: Setting) -> dict[str, Any]:
    """Bytes by part; ``weights`` and ``live`` are their sums."""
    from diffdpo.planner.memory import DEVICE

    parts = [part for part in _plan(config, setting) if part.place == DEVICE]
    weights = sum(part.bytes for part in parts if part.name == "weights")
    live = sum(part.bytes for part in parts if "backward" in part.moments) - weights
    return {"weights": weights, "live": live, "parts": [asdict(part) for part in parts]}


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


# ------------------------------------------------------------------------------------ all parameters of a 3B model

TINY_3B = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64}
TINY_3B |= {"vocab_size": 1024}
STEPS = 3
KINDS = {"optimizer": "optimizer", "on their way back": "optimizer", "gradient": "gradients", "weights": "weights"}
"""Of a planned part by a word of its name, the first that is found; what is measured is told apart alike."""


class StepPeaks(Callback):
    """The most memory until the first step is over, start included, and in the steps after it: bytes.

    A CPU's largest resident set is not taken back, so there the second is at least the first.
    """

    def __init__(self, device: torch.device):
        self.device, self.start, self.step = device, 0, 0

    def on_step(self, step: int, report: Any) -> None:
        peak = int(peak_memory_gib(self.device) * GIB)
        self.start, self.step = (peak, 0) if step == 1 else (self.start, max(self.step, peak))
        if is_gpu(self.device):
            torch.cuda.reset_peak_memory_stats(self.device)


def full3b(setting: Setting) -> dict[str, Any]:
    """recipes/full3b.yaml on random weights of docs/shapes/qwen3b.json and rows of the greatest length: the training
    itself in this process, which has no more of the GPU than a 16 GB card."""
    from diffdpo.training.preference import train

    if fault := fault_of("deepspeed"):
        return {"left_out": fault}
    if setting.kind != "cuda" and not setting.tiny:
        return {"left_out": "3B on a CPU takes hours; --tiny shows that the part works"}
    setting.of_16_gb()
    with tempfile.TemporaryDirectory() as folder:
        config, peaks = _full_run(Path(folder), setting), StepPeaks(setting.device)
        planned = _planned_moments(config, setting)
        train(config, callbacks=[peaks])
        run = Path(folder) / "run"
        held = json.loads((run / "summary.json").read_text())["held_memory_gib"]
        steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    seconds = min(line["step_seconds"] for line in steps if "loss" in line)
    measured = {"start": peaks.start, "step": peaks.step, "held_gib": held}
    what = "tensors" if setting.kind == "cuda" else "resident set of the whole process, Python and all,"
    summary = [
        f"{what} until the first step {_size(peaks.start)} (planned {_size(planned['start'])})",
        f"in a later step {_size(peaks.step)} (planned {_size(planned['step'])})",
        *(
            _against(parts, held.get(place, {}), place)
            for place, parts in planned["parts"].items()
            if any(parts.values())
        ),
        f"{seconds:.1f} s a pair",
    ]
    return {"summary": summary, "step_seconds": seconds, "planned": planned, "measured": measured}


def _against(planned: dict[str, int], held_gib: dict[str, float], place: str) -> str:
    """Weights, gradients and optimizer of a place: measured (planned)."""
    parts = [f"{part} {_size(int(held_gib.get(part, 0.0) * GIB))} ({_size(planned[part])})" for part in planned]
    return f"on the {place}, as the optimizer steps: {', '.join(parts)}"


def _full_run(folder: Path, setting: Setting) -> TrainConfig:
    """The recipe as the command line reads it, with a model, pairs and an output folder in ``folder``."""
    recipe = ROOT / "recipes/full3b.yaml"
    whole, prompt = (read_recipe(TrainConfig, recipe)[name] for name in ("max_length", "max_prompt_length"))
    whole, prompt = (128, 64) if setting.tiny else (int(whole), int(prompt))
    two, one = " 2" * (whole - prompt - 2), " 1" * (prompt - 2)  # digits are a token each; the template adds some
    pairs = [{"prompt": one, "chosen": two, "rejected": two.replace("2", str(k))} for k in range(3, 3 + STEPS)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    ds = ROOT / "ds_configs" / ("4080_offload.json" if setting.kind == "cuda" else "4080_qlora.json")
    flags = ["--config", str(recipe), "--ds_config", str(ds), "--num_eval_problems", "0", "--eval_fraction", "0"]
    flags += ["--model_name_or_path", str(_random_folder(folder / "model", setting))]
    flags += ["--max_steps", str(STEPS), "--gradient_accumulation_steps", "1", "--save_steps", "0"]
    flags += ["--save_on_full_disk", "continue"]  # nothing is saved, so no room for it is asked for
    flags += ["--tracking_uri", "none", "--bf16", str(setting.kind == "cuda").lower(), "--logging_steps", "1"]
    flags += ["--output_dir", str(folder / "run"), "--train_data", str(folder / "pairs.jsonl")]
    flags += ["--max_length", str(whole), "--max_prompt_length", str(prompt)]
    return parse_config(TrainConfig, flags, "")


def _planned_moments(config: TrainConfig, setting: Setting) -> dict[str, Any]:
    """Bytes on the device until the first step is over and in a step; and by part, as the optimizer steps."""
    from diffdpo.planner.memory import DEVICE, HOST, MOMENTS

    parts = _plan(config, setting)
    at = {m: sum(part.bytes for part in parts if part.place == DEVICE and m in part.moments) for m in MOMENTS}
    sums = {place: dict.fromkeys(("weights", "gradients", "optimizer"), 0) for place in (DEVICE, HOST)}
    for part in parts:
        kind = next((kind for word, kind in KINDS.items() if word in part.name), None)
        if kind and "update" in part.moments and part.place in sums:
            sums[part.place][kind] += part.bytes
    by_name = [asdict(part) for part in parts]
    return {"start": max(at.values()), "step": max(at["backward"], at["update"]), "parts": sums, "by_name": by_name}


def _random_folder(folder: Path, setting: Setting) -> Path:
    """Random weights of docs/shapes/qwen3b.json with the bundled tokenizer, made on the device and written."""
    from diffdpo.models.bundled import BUNDLED_MODEL
    from diffdpo.models.load import FAMILIES, load_tokenizer, made_config, save_model

    tokenizer: Any = load_tokenizer(str(BUNDLED_MODEL))
    names = ("mask_token_id", "eos_token_id", "pad_token_id")
    shape = json.loads((ROOT / "docs/shapes/qwen3b.json").read_text()) | (TINY_3B if setting.tiny else {})
    shape |= {name: getattr(tokenizer, name) for name in names}
    family = FAMILIES[shape["model_type"]]
    torch.set_default_dtype(torch.bfloat16)
    with setting.device:
        model = family.model_class(made_config(family, shape, "docs/shapes/qwen3b.json"))
    torch.set_default_dtype(torch.float32)
    save_model(model.to("cpu"), tokenizer, folder)
    return folder
