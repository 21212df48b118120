"""Do two versions of the code train alike to the bit? Three tiny runs, their metrics.jsonl compared line by line.

    python benchmarks/same_curve.py --write curves            # record this checkout
    python benchmarks/same_curve.py --against curves          # compare this checkout with the record
    python benchmarks/same_curve.py --against OTHER_CHECKOUT  # compare with another checkout, run here and now

The runs: one process on the plain engine; ZeRO-2 with its optimizer on the host; a LoRA adapter against a precomputed
reference. Times, rates and memory are left out. A change that claims no numerical effect must print "same" three times;
exit code 1 otherwise, with the first difference of each run. Compare on one machine: another one rounds otherwise.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parents[1]
COMMON = [
    *("--seed", "3", "--max_steps", "4", "--eval_steps", "2", "--per_device_train_batch_size", "4"),
    *("--gradient_accumulation_steps", "2", "--num_generated_pairs", "200", "--max_eval_pairs", "32"),
    *("--num_eval_problems", "4", "--tracking_uri", "none"),
]
RUNS = {
    "plain": ("plain", []),
    "zero2_offload": ("deepspeed", ["--ds_config", "ds_configs/4080_offload.json"]),
    "lora_precomputed": ("plain", ["--use_peft", "--reference", "precomputed", "--segmentation", "deferred"]),
}
MEASURED = ("seconds", "per_second", "memory", "time", "share", "utilisation")
"""Parts of the names of figures that depend on the machine's mood."""


def main() -> int:
    """Run, then write or compare. Returns the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--write", type=Path, help="folder for this checkout's curves")
    action.add_argument("--against", type=Path, help="such a folder, or another checkout")
    parser.add_argument("--only", choices=tuple(RUNS), help="one of the runs")
    args = parser.parse_args()
    names = [args.only] if args.only else list(RUNS)
    if args.write:
        args.write.mkdir(parents=True, exist_ok=True)
        for name in names:
            text = "\n".join(json.dumps(line) for line in curve_of(HERE, name))
            (args.write / f"{name}.jsonl").write_text(text + "\n")
        return 0
    return max([compare(name, curve_of(HERE, name), _other(args.against, name)) for name in names])


def compare(name: str, ours: list[dict], theirs: list[dict]) -> int:
    """Print whether the curves are the same, or where they first differ. 1 where they do."""
    pairs = zip(ours, theirs, strict=False)
    found = [
        (a["step"], key, a.get(key), b.get(key)) for a, b in pairs for key in {**a, **b} if a.get(key) != b.get(key)
    ]
    if len(ours) != len(theirs):
        found.append((0, "lines", len(ours), len(theirs)))
    if not found:
        print(f"{name}: same ({len(ours)} lines)")
        return 0
    step, key, a, b = found[0]
    print(f"{name}: {len(found)} differences, first at step {step}: {key} is {a!r} here and {b!r} there")
    return 1


def _other(place: Path, name: str) -> list[dict]:
    if (place / "launch").is_dir():
        return curve_of(place.resolve(), name)
    return [json.loads(line) for line in (place / f"{name}.jsonl").read_text().splitlines()]


def curve_of(checkout: Path, name: str) -> list[dict]:
    """The lines of a run of ``checkout`` without what depends on the machine's mood."""
    launcher, flags = RUNS[name]
    start = (
        [sys.executable] if launcher == "plain" else [str(Path(sys.executable).parent / "deepspeed"), "--num_gpus=1"]
    )
    paths = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    with tempfile.TemporaryDirectory() as folder:
        done = subprocess.run(
            [*start, "launch/train.py", *COMMON, *flags, "--output_dir", f"{folder}/run"],
            cwd=checkout,
            env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        if done.returncode:
            raise SystemExit(
                f"{name} in {checkout} ended with {done.returncode}:\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
            )
        lines = [json.loads(line) for line in Path(folder, "run", "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not any(part in key for part in MEASURED)} for line in lines]


if __name__ == "__main__":
    sys.exit(main())
