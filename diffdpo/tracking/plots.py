"""Pictures of a run, drawn from ``metrics.jsonl``."""

import json
from pathlib import Path

from diffdpo.tracking.journal import FILE, read_journal

TRAIN_PANELS = (
    ("loss", ("loss",)),
    ("reward margin", ("rewards/margins",)),
    ("reward accuracy", ("rewards/accuracies",)),
    ("rewards", ("rewards/chosen", "rewards/rejected")),
    ("gradient norm", ("grad_norm",)),
    ("learning rate", ("learning_rate",)),
)

PARTS = ("data", "noise", "reference", "forward", "backward", "communication", "optimizer")


def plot_curves(output_dir: Path) -> Path | None:
    """``plots/curves.png``: each panel is one quantity over steps; dots are held-out values. None without any step."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = list(read_journal(output_dir / FILE))
    panels = [(title, keys) for title, keys in TRAIN_PANELS if any(key in line for line in lines for key in keys)]
    if not panels:
        return None
    figure, axes = pyplot.subplots(2, -(-len(panels) // 2), figsize=(13, 6.5), squeeze=False, layout="constrained")
    for axis, (title, keys) in zip(axes.flat, panels, strict=False):
        for key in keys:
            _draw(axis, lines, key, "-", key if len(keys) > 1 else "training")
            _draw(axis, lines, f"eval/{key}", "o", f"eval/{key}" if len(keys) > 1 else "held out")
        axis.set(title=title, xlabel="step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.legend(fontsize=8)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    path = output_dir / "plots" / "curves.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def plot_time(output_dir: Path) -> Path | None:
    """``plots/time.png``: where the time of a step goes, over steps and on the whole. None without such times."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    lines = [line for line in read_journal(output_dir / FILE) if line.get("step_seconds") and "time/data" in line]
    lines = lines[1:] or lines  # the first step warms caches
    if not lines:
        return None
    parts = [part for part in PARTS if any(f"time/{part}" in line for line in lines)]
    times = [[line.get(f"time/{part}") or 0.0 for line in lines] for part in parts]
    rest = [
        max(0.0, line["step_seconds"] - sum(column))
        for line, column in zip(lines, zip(*times, strict=True), strict=True)
    ]
    figure, (over, whole) = pyplot.subplots(1, 2, figsize=(13, 4), layout="constrained", width_ratios=(3, 2))
    labels, times = [*parts, "other"], [*times, rest]
    over.stackplot([line["step"] for line in lines], times, labels=labels)
    over.set(title="seconds of a step, by part", xlabel="step", ylim=(0, None))
    over.legend(fontsize=8, loc="upper right")
    totals = [sum(part) / len(lines) for part in times]
    whole.barh(labels, totals, color=[f"C{i}" for i in range(len(labels))])
    for place, total in enumerate(totals):
        whole.text(total, place, f" {100 * total / max(1e-12, sum(totals)):.1f} %", va="center", fontsize=8)
    whole.invert_yaxis()
    whole.set(title="mean seconds a step", xlim=(0, 1.15 * max(totals)))
    path = output_dir / "plots" / "time.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def plot_memory(output_dir: Path) -> Path | None:
    """``plots/memory.png``: what the first process holds, by part; on the device they add up to its peak. None before
    there is a ``summary.json``."""
    try:
        held = json.loads((output_dir / "summary.json").read_text())["held_memory_gib"]
        bars = {
            part if len(held) == 1 else f"{part}, {where}": size for where in held for part, size in held[where].items()
        }
        peak = sum(held["device"].values())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(9, 0.5 * len(bars) + 1.4), layout="constrained")
    axis.barh(list(bars), list(bars.values()), color=[f"C{place}" for place in range(len(bars))])
    for place, size in enumerate(bars.values()):
        axis.text(size, place, f" {size:.3g} GiB", va="center", fontsize=8)
    axis.invert_yaxis()
    axis.set(
        title=f"memory by part; peak of the device {peak:.3g} GiB", xlabel="GiB", xlim=(0, 1.2 * max(bars.values()))
    )
    path = output_dir / "plots" / "memory.png"
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


def _draw(axis, lines: list[dict], key: str, style: str, label: str) -> None:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=5)
