"""The planner's memory against measured runs on this CPU: real engines, real steps, a fresh process each.

    python benchmarks/plan_check.py                    # all cases, docs/benchmarks/plan_check.json
    python benchmarks/plan_check.py --cases full,lora

A case is built with random weights and takes two optimizer steps on rows of equal length. Measured is the largest
resident set (VmHWM, reset before the model is built) above the resident set after imports and a warm-up with a tiny
model of the same kind. One thread; glibc maps every allocation above 64 KiB apart and unmaps it when freed
(MALLOC_MMAP_THRESHOLD_), so resident memory follows live tensors. On a CPU "device" and "host" parts lie in the same
memory: predicted is the worst moment of their sum. The live part is what comes and goes in a step: measured less the
planned static parts, against the planned activations, logits and gradients.
"""

import argparse
import ctypes
import gc
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "OMP_NUM_THREADS": "1",
    "PYTHONPATH": str(ROOT),
}
LLADA = {
    "model_type": "llada",
    "d_model": 512,
    "n_layers": 8,
    "n_heads": 8,
    "n_kv_heads": 8,
    "mlp_hidden_size": 1408,
    "vocab_size": 8192,
    "embedding_size": 8192,
    "rope": True,
    "rope_theta": 500000.0,
    "rope_full_precision": True,
    "rms_norm_eps": 1e-5,
    "layer_norm_type": "rms",
    "activation_type": "silu",
    "block_type": "llama",
    "weight_tying": False,
    "include_qkv_bias": False,
    "mask_token_id": 5,
    "eos_token_id": 6,
    "pad_token_id": 6,
}
QWEN = {
    "model_type": "qwen2",
    "hidden_size": 640,
    "num_hidden_layers": 6,
    "num_attention_heads": 10,
    "num_key_value_heads": 2,
    "intermediate_size": 1792,
    "vocab_size": 16000,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
    "mask_token_id": 5,
    "eos_token_id": 6,
}
SDAR = {
    "model_type": "sdar",
    "hidden_size": 512,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 64,
    "intermediate_size": 1408,
    "vocab_size": 8192,
    "rms_norm_eps": 1e-6,
    "rope_theta": 1e6,
    "attention_bias": False,
    "tie_word_embeddings": False,
    "block_size": 8,
    "mask_token_id": 5,
    "eos_token_id": 6,
    "pad_token_id": 6,
}
WIDE_VOCABULARY = LLADA | {"n_layers": 4, "vocab_size": 126464, "embedding_size": 126464, "d_model": 256}
ZERO_2 = {
    "stage": 2,
    "offload_optimizer": {"device": "cpu"},
    "overlap_comm": True,
    "contiguous_gradients": True,
    "reduce_bucket_size": 2_000_000,
}


@dataclass(frozen=True)
class Case:
    """A model's config.json, flags of ``launch/train.py`` and, under DeepSpeed, its ``zero_optimization``."""

    shape: Mapping[str, Any]
    flags: Mapping[str, Any] = field(default_factory=dict)
    zero: Mapping[str, Any] | None = None


COMMON = {"max_length": 256, "max_prompt_length": 128, "per_device_train_batch_size": 1, "num_mc_samples": 4}
COMMON |= {"score_estimator": "balanced"}
CASES = {
    "full": Case(LLADA, {"segmentation": "none"}),
    "full, layers recomputed": Case(LLADA, {"segmentation": "none", "gradient_checkpointing": True}),
    "full, checkpoint of 2 rows": Case(LLADA, {"segmentation": "checkpoint", "segment_rows": 2}),
    "full, two_pass of 2 rows, qwen2": Case(QWEN, {"segmentation": "two_pass", "segment_rows": 2}),
    "LoRA": Case(LLADA, {"segmentation": "none", "use_peft": True}),
    "LoRA, deferred of 2 rows, qwen2": Case(QWEN, {"segmentation": "deferred", "segment_rows": 2, "use_peft": True}),
    "LoRA, vocabulary of 126464": Case(WIDE_VOCABULARY, {"segmentation": "none", "use_peft": True}),
    "blocks, full, two_pass of 2 rows": Case(SDAR, {"segmentation": "two_pass", "segment_rows": 2}),
    "blocks, LoRA, deferred of 2 rows": Case(
        SDAR, {"segmentation": "deferred", "segment_rows": 2, "use_peft": True, "gradient_checkpointing": True}
    ),
    "full, ZeRO-2 offload": Case(LLADA, {"segmentation": "none"}, ZERO_2),
    "full, ZeRO-2 offload, two_pass of 2 rows": Case(LLADA, {"segmentation": "two_pass", "segment_rows": 2}, ZERO_2),
    "full, ZeRO-2 offload, checkpoint of 2 rows": Case(
        LLADA, {"segmentation": "checkpoint", "segment_rows": 2, "gradient_checkpointing": True}, ZERO_2
    ),
}


def settings(case: Case, folder: Path) -> Any:
    """The case as a training configuration, its files written to ``folder``."""
    from diffdpo.config import TrainConfig

    (folder / "config.json").write_text(json.dumps(case.shape))
    ds_config = None
    if case.zero is not None:
        ds_config = folder / "ds.json"
        ds_config.write_text(json.dumps({"zero_optimization": case.zero, "gradient_clipping": "auto"}))
    return TrainConfig(
        model_name_or_path=str(folder),
        ds_config=str(ds_config) if ds_config else None,
        **({"reference": "copy"} | COMMON | ({"reference": "adapter_off"} if case.flags.get("use_peft") else {})),
        **case.flags,
    )


def predict(case: Case) -> dict[str, Any]:
    """Bytes of the worst moment, of everything that is no live tensor then, and of live tensors."""
    from diffdpo.planner.memory import MOMENTS
    from diffdpo.planner.plan import Machine, make_plan

    with tempfile.TemporaryDirectory() as folder:
        plan = make_plan(settings(case, Path(folder)), Machine(None, None), cuda=False)
    sums = {m: sum(p.bytes for p in plan.parts if m in p.moments and p.place != "disk") for m in MOMENTS}
    moment = max(sums, key=sums.__getitem__)
    live = plan.run.policy.peak if moment == "backward" else 0
    return {"bytes": sums[moment], "moment": moment, "live": live}


# ------------------------------------------------------------------------------------- in a process of its own


def measure(case: Case) -> int:
    """Bytes that two real steps of the case take at most above the process before."""
    from diffdpo.engine.world import init_distributed

    world = init_distributed(always_distributed=case.zero is not None)
    tiny = dict(case.shape) | {"vocab_size": 64, "embedding_size": 64} | {"n_layers": 2, "num_hidden_layers": 2}
    flags = dict(case.flags) | {"max_length": 16, "max_prompt_length": 8}
    run(replace(case, shape=tiny, flags=flags), world)
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    before = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    run(case, world)
    return status_bytes("VmHWM") - before


def run(case: Case, world) -> None:
    """Two optimizer steps, as `diffdpo.training.preference` puts them together."""
    import torch

    from diffdpo.engine.choice import choose_engine
    from diffdpo.engine.make import make_engine
    from diffdpo.engine.optimizer import OptimizerOptions
    from diffdpo.planner.shapes import read_shape
    from diffdpo.reference.modes import make_reference
    from diffdpo.scores.masked_log_probs import MaskedLogProbs
    from diffdpo.scores.reference import frozen_copy
    from diffdpo.scores.segments import make_segments
    from diffdpo.step.backward import STRATEGIES

    with tempfile.TemporaryDirectory() as folder:
        config = settings(case if "max_length" not in case.flags else _short(case), Path(folder))
        if "max_length" in case.flags:
            config = replace(config, max_length=16, max_prompt_length=8)
        family, shape = read_shape(config.model_name_or_path)
        module = MaskedLogProbs(*_model(family, shape, config), layer_checkpointing=config.gradient_checkpointing)
        frozen = frozen_copy(module) if config.reference == "copy" else None
        config = replace(config, learning_rate=1e-4)
        choice = choose_engine(config, processes=world.size, cuda=False, bf16_able=False)
        engine = make_engine(choice, module, world, OptimizerOptions.of(config), say=print)
        segments = make_segments(config, choice, world.device)
        held = engine.freeze(frozen) if frozen is not None else None
        reference = make_reference(config, config.reference, engine, held)[0](segments)
        rows = equal_rows(config, shape.vocab_size, module.spec.block_size)
        for _ in range(2):
            with engine.no_sync() if config.segmentation == "deferred" else _nothing():
                score_R = reference(rows, None)
                STRATEGIES[config.segmentation](
                    engine,
                    rows,
                    lambda f_R, score_R=score_R: torch.nn.functional.softplus(score_R.mean() - f_R).sum(),
                    segments=segments,
                    last=True,
                )
            engine.step(1e-4)


def _short(case: Case) -> Case:
    return replace(case, flags={k: v for k, v in case.flags.items() if not k.startswith("max_")})


def _nothing():
    from contextlib import nullcontext

    return nullcontext()


def _model(family, shape, config) -> tuple[Any, Any]:
    from diffdpo.models.architecture.published_config import block_size_of
    from diffdpo.models.architecture.spec import FamilySpec
    from diffdpo.models.lora.adapters import add_lora

    spec = FamilySpec(
        shape.model_type,
        5,
        6,
        6,
        "",
        family.lora_targets,
        logit_shift=family.logit_shift,
        block_size=block_size_of(shape),
    )
    model = family.model_class(shape)
    if config.use_peft:
        return add_lora(model, spec, r=config.lora_r, alpha=config.lora_alpha), spec
    return model.requires_grad_(True), spec


def equal_rows(config, vocabulary: int, block: int | None = None):
    """The micro-batch the planner assumes: every row of full length, every token of its answer scored; of blocks over
    clean tokens, of which both answers have the prompt's whole blocks in common."""
    import torch

    from diffdpo.noise.rows import CleanAnswers, NoisyRows

    count, length = 2 * config.num_mc_samples * config.per_device_train_batch_size, config.max_length
    start = config.max_prompt_length // block * block if block else 0
    scored = length - config.max_prompt_length
    position = torch.arange(config.max_prompt_length - start, length - start)
    ids_RT = torch.randint(7, vocabulary, (count, length - start))
    clean, one_A = None, torch.ones(count // config.num_mc_samples, dtype=torch.long)
    if block:
        ids_AT = torch.randint(7, vocabulary, (len(one_A), length))
        clean = CleanAnswers(ids_AT, one_A * ((length - 1) // block * block), one_A * start, one_A * start)
    return NoisyRows(
        input_ids_RT=ids_RT,
        lengths_R=torch.full((count,), length - start),
        answer_R=torch.arange(count) // config.num_mc_samples,
        weight_R=torch.full((count,), 1.0 / config.num_mc_samples),
        share_R=torch.full((count,), scored / config.num_mc_samples),
        row_M=torch.arange(count).repeat_interleave(scored),
        position_M=position.repeat(count),
        target_M=ids_RT[:, position].flatten(),
        scale_M=torch.ones(count * scored),
        tokens_A=one_A * scored,
        block_R=torch.arange(count),
        cell_R=torch.arange(count) // config.num_mc_samples,
        clean=clean,
    )


def status_bytes(key: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


# ------------------------------------------------------------------------------------------------- outside


def check(name: str) -> dict[str, Any]:
    """One case, planned and measured; MiB, and errors as shares of what was measured."""
    planned = predict(CASES[name])
    command = [sys.executable, str(Path(__file__)), "--measure", name]
    done = subprocess.run(command, env={**os.environ, **ENVIRONMENT}, capture_output=True, text=True, timeout=900)
    if done.returncode:
        raise RuntimeError(f"{name}: {done.stderr[-2000:]}")
    measured = int(done.stdout.strip().splitlines()[-1])
    static = planned["bytes"] - planned["live"]
    return {
        "case": name,
        "measured_mib": round(measured / 2**20),
        "planned_mib": round(planned["bytes"] / 2**20),
        "error": round(planned["bytes"] / measured - 1, 3),
        "live_mib": round(planned["live"] / 2**20),
        "live_error": round(planned["live"] / (measured - static) - 1, 3) if planned["live"] else None,
        "moment": planned["moment"],
    }


def table(records: list[dict[str, Any]]) -> str:
    """As Markdown."""
    lines = ["| case | measured MiB | planned MiB | error | live part planned MiB | its error | worst moment |"]
    lines.append("|---|---|---|---|---|---|---|")
    for r in records:
        live = f"{r['live_mib']} | {r['live_error']:+.1%}" if r["live_mib"] else "- | -"
        lines.append(
            f"| {r['case']} | {r['measured_mib']} | {r['planned_mib']} | {r['error']:+.1%} | {live} | {r['moment']} |"
        )
    return "\n".join(lines)


def save(path: Path, record: dict[str, Any]) -> None:
    """Into the file, in the order of the cases."""
    import torch

    content = json.loads(path.read_text()) if path.exists() else {"records": []}
    found = {each["case"]: each for each in content["records"]} | {record["case"]: record}
    machine = f"{platform.machine()} CPU, one thread, torch {torch.__version__}"
    ordered = [found[name] for name in CASES if name in found]
    path.write_text(json.dumps({"machine": machine, "records": ordered}, indent=1) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", help="names with semicolons; default: all")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, default=ROOT / "docs/benchmarks/plan_check.json")
    args = parser.parse_args()
    if args.measure:
        print(measure(CASES[args.measure]))
        return
    for name in args.cases.split(";") if args.cases else CASES:
        record = check(name)
        save(args.output, record)
        print(table([record]).splitlines()[-1], flush=True)
    print(table(json.loads(args.output.read_text())["records"]))


if __name__ == "__main__":
    main()
