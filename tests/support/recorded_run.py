"""The folder of a run that never ran: what a comparison reads, in a moment."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

DEFAULTS = {"beta": 0.1, "learning_rate": 1e-4, "loss_type": "sigmoid", "seed": 0, "max_steps": 10, "train_data": None}


def recorded_run(
    folder: Path,
    *,
    margins: Sequence[float] = (),
    steps: int = 10,
    finished: bool = True,
    data: str = "held-out",
    names: Sequence[str] | None = None,
    values: Mapping[str, Sequence[float]] | None = None,
    **settings: Any,
) -> Path:
    """Write it: ``margins`` are the held-out reward margins at the end, an item each; their signs give the accuracy.
    ``values``: further metrics, item by item."""
    folder.mkdir(parents=True)
    config = {**DEFAULTS, "run_name": folder.name, "output_dir": str(folder), **settings}
    (folder / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    (folder / "asked.yaml").write_text(yaml.safe_dump(settings))
    (folder / "environment.json").write_text(json.dumps({"device": "cpu (x86_64)", "git": {"commit": "c" * 40}}))
    after = {"rewards/margins": list(margins), "rewards/accuracies": [float(m > 0) for m in margins]} if margins else {}
    after |= {key: list(items) for key, items in (values or {}).items()}
    lines = [{"step": 0, "time": 100.0, **{f"eval/{key}": 0.0 for key in after}}]
    for step in range(1, steps + 1):
        metrics = {"loss": 0.7 - 0.01 * step, "pairs_per_second": 4.0, "step_seconds": 2.0, "peak_memory_gib": 1.5}
        lines.append({"step": step, "time": 100.0 + 2 * step, **metrics})
    if finished:
        lines.append(
            {"step": steps, "time": 101.0 + 2 * steps} | {f"eval/{k}": sum(v) / len(v) for k, v in after.items()}
        )
        held_out = {key: dict.fromkeys(("before", "after", "change"), figure(items)) for key, items in after.items()}
        summary = {"run_name": config["run_name"], "steps": steps, "seconds": 60.0, "held_out": held_out}
        (folder / "summary.json").write_text(json.dumps(summary))
    items = names or [f"record-{i}" for i in range(len(margins))]
    (folder / "held_out.json").write_text(json.dumps({"data": data, "records": items, "problems": [], "after": after}))
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def figure(values: Sequence[float]) -> dict[str, Any]:
    """Mean and standard error as summary.json has them."""
    mean = sum(values) / len(values)
    spread = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return {"mean": mean, "stderr": (spread / len(values)) ** 0.5, "count": len(values)}
