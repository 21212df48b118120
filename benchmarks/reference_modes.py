"""What a training step costs with each way to have the reference's scores, in one run.

    python benchmarks/reference_modes.py [--steps 8] [--pairs 8] [--num_mc_samples 4]

The modes take turns on the same micro-batches of the bundled model and generated pairs: full parameters under `copy`
and `precomputed`, LoRA under `adapter_off` and `precomputed`. Time is the process's CPU time with one thread on a CPU
(other work on the machine does not count), wall time on a GPU. Writes docs/benchmarks/reference_modes.{json,md}.
"""

import argparse
import json
import platform
import tempfile
import time
from pathlib import Path

import torch

from data_pipeline.dataset import ShardedDataset
from diffdpo.config import TrainConfig
from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import World
from diffdpo.models.bundled import BUNDLED_MODEL
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import load_model, load_tokenizer_and_spec
from diffdpo.models.lora.adapters import add_lora
from diffdpo.noise.options import NoiseOptions
from diffdpo.reference.modes import make_frozen, make_reference
from diffdpo.reference.precompute import ReferencePass
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.segments import make_segments
from diffdpo.setup import data as run_data
from diffdpo.setup.context import RunContext
from diffdpo.step.step import PreferenceStep

MODES = (("all", "copy"), ("all", "precomputed"), ("LoRA", "adapter_off"), ("LoRA", "precomputed"))


def main() -> None:
    """Time the modes in turn, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=8, help="timed, after one that warms up")
    parser.add_argument("--pairs", type=int, default=8, help="in a step")
    parser.add_argument("--num_mc_samples", type=int, default=4)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/benchmarks/reference_modes")
    args = parser.parse_args()
    torch.set_num_threads(1)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    seconds, spent = measure(args, device)
    machine = (
        torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU, one thread, CPU time"
    )
    records = [
        {
            "trained": trained,
            "reference": mode,
            "pairs_per_second": round(args.pairs * args.steps / seconds[trained, mode], 2),
        }
        for trained, mode in MODES
    ]
    everything = {
        "machine": machine,
        "pass_pairs_per_second": round(spent, 2),
        "settings": {name: value for name, value in vars(args).items() if name != "output"},
        "records": records,
    }
    args.output.with_suffix(".json").write_text(json.dumps(everything, indent=1) + "\n")
    text = table(records, spent, machine, args)
    args.output.with_suffix(".md").write_text(text)
    print(text)


def measure(args: argparse.Namespace, device: torch.device) -> tuple[dict[tuple[str, str], float], float]:
    """(seconds of all timed steps by mode, pairs/s of the pass that makes the scores)."""
    world = World(0, 0, 1, device)
    with tempfile.TemporaryDirectory() as folder:
        context = RunContext(world, Path(folder) / "out", Path(folder) / "cache", "benchmark")
        context.cache_dir.mkdir()
        config = TrainConfig(
            per_device_train_batch_size=args.pairs,
            num_mc_samples=args.num_mc_samples,
            max_steps=args.steps + 1,
            num_generated_pairs=args.pairs * (args.steps + 1),
            learning_rate=1e-4,
            max_length=128,
            max_prompt_length=64,
        )
        dataset, _ = run_data.open_data(config, context, run_data.generated(config, context.world))
        tokenizer, spec = load_tokenizer_and_spec(str(BUNDLED_MODEL))
        encoder = make_encoder(config, tokenizer, spec)
        options = {"encoder": encoder, "spec": spec, "cache_dir": context.cache_dir, "say": print}
        work = ReferencePass(config, EngineChoice(), world, **options)
        started = clock(device)
        loader = run_data.train_loader(config, dataset, encoder, world)
        scores = work.complete([work.training(loader, last=run_data.total_steps(config, loader))])
        pass_rate = args.pairs * (args.steps + 1) / (clock(device) - started)
        steps = {key: make_step(config, world, *key, scores.train) for key in MODES}
        batches = batches_of(config, dataset, world)
        seconds = dict.fromkeys(MODES, 0.0)
        for number, batch in enumerate(batches):
            for key, step in steps.items():
                started = clock(device)
                step([batch], 1e-5)
                seconds[key] += (clock(device) - started) if number else 0.0
    return seconds, pass_rate


def batches_of(config: TrainConfig, dataset: ShardedDataset, world: World) -> list:
    """The micro-batches of the run."""
    loaded = load_model(str(BUNDLED_MODEL))
    encoder = make_encoder(config, loaded.tokenizer, loaded.spec)
    steps = run_data.train_loader(config, dataset, encoder, world).steps()
    return [next(steps)[0] for _ in range(config.max_steps)]


def make_step(config: TrainConfig, world: World, trained: str, mode: str, stored) -> PreferenceStep:
    """A policy of its own with the reference of ``mode``."""
    loaded = load_model(str(BUNDLED_MODEL))
    model = add_lora(loaded.model, loaded.spec) if trained == "LoRA" else loaded.model.requires_grad_(True)
    module = MaskedLogProbs.of(model, loaded.spec, config)
    segments = make_segments(config, EngineChoice(), world.device)
    frozen = make_frozen(config, module, EngineChoice(), world) if mode == "copy" else None
    engine = PlainEngine(module, world, OptimizerOptions.of(config))
    reference = stored
    if mode != "precomputed":
        reference = make_reference(config, mode, engine, engine.freeze(frozen) if frozen else None)[0](segments)
    noise = NoiseOptions.of(config, loaded.spec)
    return PreferenceStep(engine, reference, noise, config.loss(), strategy="none", segments=segments)


def clock(device: torch.device) -> float:
    """Seconds that count."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize()
    return time.perf_counter()


def table(records: list[dict], pass_rate: float, machine: str, args: argparse.Namespace) -> str:
    """The results as Markdown."""
    lines = [
        "# A training step with each way to have the reference's scores",
        "",
        f"`benchmarks/reference_modes.py` on {machine}; bundled model (0.87M), {args.pairs} pairs a step, n = "
        f"{args.num_mc_samples}, {args.steps} steps, modes in turn.",
        "",
        "| trained | reference | pairs/s | against |",
        "|---|---|---|---|",
    ]
    for record in records:
        base = next(other for other in records if other["trained"] == record["trained"])
        ratio = record["pairs_per_second"] / base["pairs_per_second"]
        against = "1" if record is base else f"{ratio:.2f} x {base['reference']}"
        lines.append(f"| {record['trained']} | {record['reference']} | {record['pairs_per_second']:.1f} | {against} |")
    return "\n".join(
        [*lines, "", f"The pass that makes the scores: {pass_rate:.1f} pairs/s, model loading included.", ""]
    )


if __name__ == "__main__":
    main()
