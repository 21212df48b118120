"""``stats``: lengths, prompt/answer ratio, duplicates, source mix; in tokens also what truncation loses."""

import argparse
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np

from data_pipeline.batch import Fault
from data_pipeline.commands.common import check_writable, dataset_of, encoder_of
from data_pipeline.dataset import ShardedDataset
from data_pipeline.encode import Drop, Encoder
from data_pipeline.errors import DataError
from data_pipeline.shards import to_json
from data_pipeline.stages import RecordReader

PERCENTILES = (5, 50, 95, 99)
UNLIMITED = 1 << 30  # tokens: lengths before any cut


def run(args: argparse.Namespace) -> int:
    """Print the figures; write them as JSON and as histograms where asked."""
    if args.plot and args.plot.suffix != ".png":
        raise DataError(f"--plot {args.plot} must end in .png")
    check_writable(args.plot, args.json)
    encoder = encoder_of(args)
    dataset = dataset_of(args)
    figures, lengths, unit = *byte_figures(dataset), "bytes"
    if encoder:
        token, lengths = token_figures(dataset, encoder)
        figures, unit = figures | {"tokens": token}, "tokens"
    print("\n".join(report_lines(figures)))
    if args.json:
        args.json.write_bytes(to_json(figures))
    if args.plot:
        plot(figures, lengths, unit, args.plot, encoder.max_length if encoder else None)
        print(f"histograms: {args.plot}")
    return 0


def _spread(values: np.ndarray) -> dict:
    """Mean, extremes and percentiles of a length; empty without values."""
    if not len(values):
        return {}
    points = {f"p{p}": float(np.percentile(values, p)) for p in PERCENTILES}
    return {"min": int(values.min()), **points, "max": int(values.max()), "mean": round(float(values.mean()), 2)}


def byte_figures(dataset: ShardedDataset) -> tuple[dict, dict[str, np.ndarray]]:
    """Figures from the index alone, and the lengths (UTF-8 bytes) of prompt, chosen and rejected."""
    columns = {
        name: np.concatenate([part.column(f"{name}_bytes") for part in dataset.parts])
        for name in ("prompt", "chosen", "rejected")
    }
    prompts = np.concatenate([part.column("prompt") for part in dataset.parts])
    content = np.concatenate([part.column("content") for part in dataset.parts])
    pairs = (columns["chosen"] > 0) & (columns["rejected"] > 0)
    lengths = {name: column[column > 0] for name, column in columns.items()}
    answers = np.maximum(columns["chosen"], columns["rejected"])
    ratio = columns["prompt"] / np.maximum(answers, 1)
    figures = {
        "records": len(dataset),
        "pairs": int(pairs.sum()),
        "unpaired": int((~pairs).sum()),
        "prompts": len(np.unique(prompts)),
        "duplicate_records": len(content) - len(np.unique(content)),
        "chosen_longer": round(float((columns["chosen"] > columns["rejected"])[pairs].mean()), 4)
        if pairs.any()
        else None,
        "prompt_to_answer": _spread(np.round(ratio, 3)),
        "sources": source_mix(dataset),
        "unusable": dict(Counter(bad["kind"] for part in dataset.parts for bad in part.index.manifest["bad"])),
        "dropped": _dropped(dataset),
        "bytes": {name: _spread(values) for name, values in lengths.items()},
    }
    return figures, lengths | {"ratio": ratio, "total": columns["prompt"] + answers}


def source_mix(dataset: ShardedDataset) -> dict[str, int]:
    """Records by ``meta.source``."""
    mix: Counter[str] = Counter()
    for part in dataset.parts:
        names = part.index.manifest["sources"]
        for number, count in enumerate(np.bincount(part.column("source"), minlength=len(names))):
            mix[names[number] or "(none)"] += int(count)
    return {name: count for name, count in mix.most_common() if count}


def _dropped(dataset: ShardedDataset) -> dict[str, int]:
    dropped: Counter[str] = Counter()
    for part in dataset.parts:
        report = part.index.manifest.get("provenance", {}).get("report", {})
        dropped.update({kind: item["count"] for kind, item in report.get("dropped", {}).items()})
    return dict(dropped)


def token_figures(dataset: ShardedDataset, encoder: Encoder) -> tuple[dict, dict[str, np.ndarray]]:
    """Token lengths before any cut, what the encoder's options cut or drop, and the lengths."""
    lengths: dict[str, list[int]] = {"prompt": [], "chosen": [], "rejected": [], "longer": []}
    outcome: Counter[str] = Counter()
    whole = replace(encoder, max_length=UNLIMITED, max_prompt_length=None)
    reader = RecordReader(dataset)
    for number in range(len(dataset)):
        record = reader(number)
        if isinstance(record, Fault):
            outcome["unreadable"] += 1
            continue
        uncut, pair = whole(record), encoder(record)
        if isinstance(uncut, Drop) or isinstance(pair, Drop):
            outcome[f"dropped_{(pair if isinstance(pair, Drop) else uncut).reason}"] += 1  # type: ignore[union-attr]
        if isinstance(uncut, Drop):
            continue
        sides = {name: side for name, side in (("chosen", uncut.chosen), ("rejected", uncut.rejected)) if side}
        lengths["prompt"].append(next(iter(sides.values())).prompt_length)
        answers = {name: len(side.ids) - side.prompt_length for name, side in sides.items()}
        for name, length in (*answers.items(), ("longer", max(answers.values()))):
            lengths[name].append(length)
        if not isinstance(pair, Drop):
            _count_cuts(outcome, sides, pair)
            outcome["end_token_taken_off"] += pair.ended
    reader.close()
    arrays = {name: np.array(values, np.int64) for name, values in lengths.items()}
    longer = arrays.pop("longer")
    figures = {name: _spread(values) for name, values in arrays.items()}
    cuts = {"max_length": encoder.max_length, "truncation": dict(sorted(outcome.items()))}
    return figures | cuts, arrays | {
        "ratio": arrays["prompt"] / np.maximum(longer, 1),
        "total": arrays["prompt"] + longer,
    }


def _count_cuts(outcome: Counter, before: dict, pair) -> None:
    """What of one record was cut: records by part, and tokens."""
    outcome["kept_whole"] += not pair.truncated
    for name, uncut in before.items():
        side = getattr(pair, name)
        answer = len(uncut.ids) - uncut.prompt_length - (len(side.ids) - side.prompt_length)
        outcome[f"{name}_cut"] += answer > 0
        outcome["answer_tokens_lost"] += max(0, answer)
    outcome["prompt_cut"] += uncut.prompt_length > side.prompt_length
    outcome["prompt_tokens_lost"] += uncut.prompt_length - side.prompt_length


def report_lines(figures: dict) -> list[str]:
    """The figures as text: one line each, spreads in one line, mixes with shares."""
    lines = []
    for name, value in figures.items():
        if isinstance(value, dict) and value and all(isinstance(item, dict) for item in value.values()):
            lines += [f"{name}, {part}: {_pairs(item)}" for part, item in value.items() if item]
        elif name == "tokens":
            lines += [
                f"{name}, {part}: {_pairs(item) if isinstance(item, dict) else item}" for part, item in value.items()
            ]
        elif name == "sources":
            lines += [f"source {part}: {count} ({count / figures['records']:.1%})" for part, count in value.items()]
        else:
            lines.append(f"{name}: {_pairs(value) or 'none' if isinstance(value, dict) else value}")
    return lines


def _pairs(values: dict) -> str:
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def plot(figures: dict, lengths: dict[str, np.ndarray], unit: str, path: Path, max_length: int | None) -> None:
    """Histograms of the three lengths and of prompt / answer, the share that fits a given length, the source mix."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 3, figsize=(12, 6.4), constrained_layout=True)
    for axis, name in zip(axes[0], ("prompt", "chosen", "rejected"), strict=True):
        _histogram(axis, lengths[name], name, unit)
    _histogram(axes[1, 0], lengths["ratio"], "prompt / longer answer", "ratio")
    totals = np.sort(lengths["total"])
    axes[1, 1].plot(totals, np.arange(1, len(totals) + 1) / max(1, len(totals)))
    axes[1, 1].set(title="what fits", xlabel=f"{unit} of prompt and longer answer", ylabel="share of records")
    if max_length:
        axes[1, 1].axvline(max_length, color="black", linestyle=":", label=f"max_length {max_length}")
        axes[1, 1].legend()
    names = list(figures["sources"])[:12][::-1]
    axes[1, 2].barh(names, [figures["sources"][name] for name in names])
    axes[1, 2].set(title="sources", xlabel="records")
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _histogram(axis, values: np.ndarray, name: str, unit: str) -> None:
    if len(values):
        axis.hist(np.clip(values, None, np.percentile(values, 99.5)), bins=40)  # the last bin holds the tail
    axis.set(title=f"{name} ({len(values)})", xlabel=unit, ylabel="records")
