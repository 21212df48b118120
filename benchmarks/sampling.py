"""Faster decoding against one token a step: seconds, forwards, and how often the answers agree and are right.

    python benchmarks/sampling.py --model_name_or_path DIR

Prompts are generated arithmetic problems the model has not seen; an answer is right when its last number is.
Times are process time (CPU) or wall time (GPU). Writes docs/benchmarks/sampling.{json,md}.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from data_pipeline.generate import generate_pairs
from diffdpo.models.load import load_model
from diffdpo.sampling.decode import sample

WAYS: dict[str, dict] = {
    "one token a step": {},
    "two tokens a step": {"steps": 0.5},
    "threshold 0.9": {"threshold": 0.9},
    "block cache": {"block_cache": True},
    "threshold 0.9, block cache": {"threshold": 0.9, "block_cache": True},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model_name_or_path", required=True)
    parser.add_argument("--num_prompts", type=int, default=32)
    parser.add_argument("--gen_length", type=int, default=64)
    parser.add_argument("--block_length", type=int, default=16)
    parser.add_argument("--output", type=Path, default=Path(__file__).parents[1] / "docs/benchmarks/sampling")
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = load_model(args.model_name_or_path, device=device)
    tokenizer = loaded.tokenizer
    pairs = list(generate_pairs(args.num_prompts, seed=12345))
    prompts = [tokenizer(pair["prompt"], add_special_tokens=False).input_ids for pair in pairs]
    truths = [pair["meta"]["answer"] for pair in pairs]
    forwards = [0]
    loaded.model.get_input_embeddings().register_forward_hook(lambda *_: forwards.__setitem__(0, forwards[0] + 1))
    records, baseline = [], None
    for name, way in WAYS.items():
        options = {"gen_length": args.gen_length, "block_length": args.block_length, "steps": args.gen_length} | way
        options["steps"] = int(args.gen_length * way.get("steps", 1))
        clock = time.perf_counter if device == "cuda" else time.process_time
        forwards[0], start = 0, clock()
        answers = sample(loaded.model, loaded.spec, prompts, batch_size=16, **options)
        seconds = clock() - start
        baseline = baseline or answers
        right = [final_number(tokenizer.decode(a)) == truth for a, truth in zip(answers, truths, strict=True)]
        same = [a == b for a, b in zip(answers, baseline, strict=True)]
        records.append(
            {
                "way": name,
                "seconds": round(seconds, 2),
                "forwards": forwards[0],
                "same_answers": sum(same) / len(same),
                "right": sum(right) / len(right),
            }
        )
        print(json.dumps(records[-1]), flush=True)
    machine = torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} CPU, process time"
    args.output.with_suffix(".json").write_text(json.dumps({"machine": machine, "records": records}, indent=1) + "\n")
    args.output.with_suffix(".md").write_text(table(records, machine, args))


def final_number(text: str) -> str | None:
    """The last number in a text."""
    words = [word.strip(".,") for word in text.replace("=", " ").split()]
    numbers = [word for word in words if word.lstrip("-").isdigit()]
    return numbers[-1] if numbers else None


def table(records: list[dict], machine: str, args) -> str:
    lines = [
        "# Faster decoding against one token a step",
        "",
        f"`benchmarks/sampling.py` on {machine}; {args.num_prompts} arithmetic prompts in batches of 16, greedy, "
        f"{args.gen_length} tokens in blocks of {args.block_length}.",
        "",
        "| way | seconds | times faster | forwards | same answers | right |",
        "|---|---|---|---|---|---|",
    ]
    for r in records:
        speed = records[0]["seconds"] / r["seconds"]
        lines.append(
            f"| {r['way']} | {r['seconds']:.2f} | {speed:.1f} | {r['forwards']} "
            f"| {r['same_answers']:.0%} | {r['right']:.0%} |"
        )
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    main()
