"""Pictures of a run, drawn from ``metrics.jsonl``."""

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


def _draw(axis, lines: list[dict], key: str, style: str, label: str) -> None:
    points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
    if points:
        axis.plot(*zip(*points, strict=True), style, label=label, linewidth=1.2, markersize=5)
