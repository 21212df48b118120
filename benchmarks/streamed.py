"""Weights and optimizer state that come from elsewhere for every pass: what a step moves, against theory.

    python -m benchmarks.streamed --disk FOLDER --output docs/benchmarks/streamed     # FOLDER: on the disk measured

Real steps of one process under DeepSpeed's ZeRO-3 on a CPU, all weights trained, ``two_pass``, no reference: state in
memory, and on a disk as `ds_configs/zero3_nvme.json` puts it there (libaio, O_DIRECT), with the weights there too.
Counted are the bytes of weights that DeepSpeed fetches for modules (its own call for that), and what the kernel says
that this process read from and wrote to disks (/proc/self/io). Every way must give the losses of the plain engine.

Theory, P weights of 4 bytes, a step of S segments: a pass fetches every weight once, and there are three for a segment
(its scores, then a forward and a backward, in which a recomputed layer's weights are those its gradient needs next):
12 P S. A step reads fp32 weights, two moments and gradients of all P from the disk, and writes as much: 16 P each way.
What lies on a disk is that of 1 MiB and more: DeepSpeed keeps smaller pieces on the host.

Weights on the disk are measured without recomputed layers, from which DeepSpeed takes wrong gradients
(`engine.preflight.recomputing_obstacle`).
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

from benchmarks.throughput import SHAPES, Shape, make_batch, plain_model
from diffdpo.engine.choice import PLAIN, EngineChoice, deepspeed_choice
from diffdpo.engine.make import make_engine
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.world import init_distributed, shutdown_distributed
from diffdpo.losses.options import LossOptions
from diffdpo.memory.peak import peak_memory_gib
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import no_reference
from diffdpo.scores.segments import Segments
from diffdpo.step.step import PreferenceStep

ROOT = Path(__file__).parents[1]
WAYS: dict[str, dict[str, Any] | None] = {  # offload_optimizer, offload_param
    "plain": None,
    "zero3": {},
    "zero3, optimizer on the disk": {"offload_optimizer": "nvme", "offload_param": "cpu"},
    "zero3, all on the disk": {"offload_optimizer": "nvme", "offload_param": "nvme"},
}
CPU, AWAY = torch.device("cpu"), ZeroParamStatus.NOT_AVAILABLE
MICRO_BATCHES, ROWS, SAMPLES, STEPS = 2, 8, 4, 3


def main() -> None:
    """Every way in a process of its own, then the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--disk", type=Path, required=True, help="folder on the disk to be measured")
    parser.add_argument("--shape", default="small", help="of benchmarks/throughput.py")
    parser.add_argument("--output", type=Path, help="files to write, without their ending")
    parser.add_argument("--way", choices=list(WAYS), help="measure this one, here")
    args = parser.parse_args()
    if args.way:
        print(json.dumps(measure(args.way, args.shape, args.disk)))
        return
    rows = []
    for name in WAYS:
        line = [sys.executable, "-m", "benchmarks.streamed", "--disk", args.disk, "--shape", args.shape, "--way", name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        done = subprocess.run([*map(str, line)], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"{name} ended with {done.returncode}:\n{done.stderr[-3000:]}")
        rows.append(json.loads(done.stdout.splitlines()[-1]))
        print(table(rows[-1:]).splitlines()[-1], flush=True)
    if args.output:
        args.output.with_suffix(".json").write_text(json.dumps({"shape": args.shape, "rows": rows}, indent=1) + "\n")
        args.output.with_suffix(".md").write_text(table(rows) + "\n")


def measure(name: str, shape_name: str, disk: Path) -> dict[str, Any]:
    """Steps of one way, the first not counted; of the others the middle one by seconds."""
    options, shape = OptimizerOptions(learning_rate=1e-4), SHAPES[shape_name]
    world = init_distributed(always_distributed=WAYS[name] is not None)
    model, spec = plain_model(shape)
    weights, batches = sum(p.numel() for p in model.parameters()), [make_batch(shape)] * MICRO_BATCHES
    with tempfile.TemporaryDirectory(dir=disk) as folder:
        recomputes = (WAYS[name] or {}).get("offload_param") != "nvme"
        module = MaskedLogProbs(model, spec, layer_checkpointing=recomputes)
        engine = make_engine(choice_of(name, shape, folder, options), module, world, options, say=lambda line: None)
        noise, segments = NoiseOptions("balanced", SAMPLES, 0, spec.mask_token_id), Segments(rows=ROWS)
        loss = LossOptions(("sigmoid",), (1.0,), beta=0.1)
        step = PreferenceStep(engine, no_reference, noise, loss, strategy="two_pass", segments=segments, compared=False)
        fetched, steps = Fetched(), []
        for _ in range(1 + STEPS):
            before, started = moved() | {"fetched": fetched.bytes}, time.perf_counter()
            report = step(batches, 1e-4)
            after = moved() | {"fetched": fetched.bytes}
            seconds = time.perf_counter() - started
            steps.append({key: after[key] - before[key] for key in after} | {"seconds": seconds, "loss": report.loss})
    shutdown_distributed()
    cuts = len(segments(noise.draw_rows(batches[0], world.device))) * MICRO_BATCHES
    middle = sorted(steps[1:], key=lambda each: each["seconds"])[STEPS // 2]
    losses = [each.pop("loss") for each in steps]
    return {"way": name, "weights": weights, "segments": cuts, "losses": losses, **middle, "peak": peak_memory_gib(CPU)}


def choice_of(name: str, shape: Shape, folder: str, options: OptimizerOptions) -> EngineChoice:
    """The engine of one way; its state in ``folder`` where it is on the disk. What may be live at once, and what is
    fetched ahead, are the JSON's in proportion to a layer (of LLaDA-8B 218 million weights)."""
    offload = WAYS[name]
    if offload is None:
        return EngineChoice(PLAIN, 1)
    layer = 4 * shape.width**2 + 3 * shape.width * shape.mlp
    zero: dict[str, Any] = {"stage": 3, "sub_group_size": 2 * layer, "stage3_param_persistence_threshold": shape.width}
    zero |= {"stage3_max_live_parameters": int(1.4 * layer), "stage3_prefetch_bucket_size": layer // 11}
    for part, device in offload.items():
        zero[part] = {"device": device} | ({"nvme_path": folder, "buffer_count": 4} if device == "nvme" else {})
        if device == "nvme" and part == "offload_param":
            zero[part] |= {"buffer_count": 16, "buffer_size": shape.vocab * shape.width, "max_in_cpu": 0}
    given = {"zero_optimization": zero, "aio": {"block_size": 1048576, "queue_depth": 16, "intra_op_parallelism": 2}}
    return deepspeed_choice(given, options, micro_batch_size=1, accumulation_steps=MICRO_BATCHES, processes=1)


class Fetched:
    """Bytes of weights that DeepSpeed has fetched for modules since this was made."""

    def __init__(self) -> None:
        self.bytes = 0
        own = "_PartitionedParameterCoordinator__all_gather_params_"
        fetch = getattr(PartitionedParameterCoordinator, own)

        def counted(coordinator: Any, params: Any, *rest: Any, **named: Any) -> Any:
            params = list(params)
            self.bytes += sum(p.ds_numel * p.element_size() for p in params if p.ds_status == AWAY)
            return fetch(coordinator, params, *rest, **named)

        setattr(PartitionedParameterCoordinator, own, counted)


def moved() -> dict[str, int]:
    """Bytes that this process has read from and written to disks."""
    lines = (line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return {key: int(value) for key, value in lines if key in ("read_bytes", "write_bytes")}


def table(rows: list[dict[str, Any]]) -> str:
    """As Markdown, MB; theory in brackets."""
    lines = ["| state | s a step | fetched | read from the disk | written | peak GiB | furthest loss from plain |"]
    lines.append("|---" * 7 + "|")
    for row in rows:
        size, offload = row["weights"], WAYS[row["way"]]
        passes = 3 * row["segments"] if offload is not None else 0
        state = 16 if (offload or {}).get("offload_optimizer") == "nvme" else 0
        weights = 4 * passes if (offload or {}).get("offload_param") == "nvme" else 0
        cells = [row["way"], f"{row['seconds']:.2f}"]
        back = 4 if weights else 0  # what the step has changed
        for key, theory in (("fetched", 4 * passes), ("read_bytes", state + weights), ("write_bytes", state + back)):
            cells.append(f"{row[key] / 1e6:.0f} ({theory * size / 1e6:.0f})")
        apart = max(abs(a - b) for a, b in zip(row["losses"], rows[0]["losses"], strict=True))
        lines.append(f"| {' | '.join(cells)} | {row['peak']:.2f} | {apart:.1e} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
