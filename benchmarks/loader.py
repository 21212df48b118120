"""The loader's cost, beside plain webdataset on the same shards in the same run. Prints a table and writes JSON.

    python benchmarks/loader.py --work /tmp/loader_bench --out docs/benchmarks/loader.json

"plain" is ``wds.WebDataset(shards, nodesplitter=split_by_node).shuffle(1000)`` with the same encoder and collation; to
resume it can only read again what it had read, which is done here without encoding, its best case.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import psutil
import torch
import webdataset as wds

from data_pipeline.batch import PairBatch, collate
from data_pipeline.encode import Encoder
from data_pipeline.generate import generate_pairs, write_jsonl
from data_pipeline.index import load_index, save_index
from data_pipeline.reader import PairLoader, open_dataset
from data_pipeline.records import decode_record
from data_pipeline.shard_builder import BuildOptions, build
from data_pipeline.shards import ENTRY

SHARD_SIZE, MICRO, GLOBAL = 4000, 8, 64
RESUME_SAMPLE = 100_000


def corpus(work: Path, records: int) -> Path:
    """Shards of pairs of about 1.2 kB: several generated problems each, unique by number, of lengths spread 1 to 8."""
    source, out = work / f"pairs-{records}.jsonl", work / f"shards-{records}"
    if not source.exists():
        base = list(generate_pairs(2000, seed=0))
        pick = random.Random(0)

        def rows() -> Iterator[dict]:
            for i in range(records):
                parts = pick.sample(base, pick.randint(1, 8))
                sides = {name: "\n".join(p[name] for p in parts) for name in ("prompt", "chosen", "rejected")}
                yield sides | {"id": f"b{i}", "prompt": f"Task {i}. {sides['prompt']}"}

        write_jsonl(rows(), source)
    started = time.perf_counter()
    build([str(source)], out, BuildOptions(shard_size=SHARD_SIZE), workers=os.cpu_count() or 1)
    seconds = time.perf_counter() - started
    print(f"build: {seconds:.1f} s (0 when it was there)", file=sys.stderr)
    return out


def train_tokenizer(work: Path):
    """A byte-level BPE of 8,000 tokens, trained on generated text: as fast as those of real models."""
    from tokenizers import ByteLevelBPETokenizer
    from transformers import PreTrainedTokenizerFast

    core = ByteLevelBPETokenizer()
    texts = (row["prompt"] + row["chosen"] for row in generate_pairs(20_000, seed=1))
    core.train_from_iterator(texts, vocab_size=8000, special_tokens=["<pad>", "<eos>"], show_progress=False)
    return PreTrainedTokenizerFast(tokenizer_object=core._tokenizer, pad_token="<pad>", eos_token="<eos>")


def ours(dataset, encoder: Encoder, workers: int, *, step: int = 0, **options) -> PairLoader:
    """Our loader at a step of epoch 0."""
    loader = PairLoader(
        dataset, encoder, seed=1, global_batch_size=GLOBAL, micro_batch_size=MICRO, num_workers=workers, **options
    )
    loader.load_state_dict(loader.state_dict() | {"step": step})
    return loader


def plain(folder: Path, encoder: Encoder, workers: int, *, skip: int = 0) -> Iterator[PairBatch]:
    """webdataset as its documentation shows it."""
    urls = [str(path) for path in sorted(folder.glob("*.tar"))]

    def batch(samples: list[dict]) -> PairBatch:
        pairs = encoder.encode_many([decode_record(sample["json"]) for sample in samples])
        place = {"epoch": 0, "step": 0, "micro": 0, "last_micro": True}
        return collate(pairs, pad_id=0, **place)  # type: ignore[arg-type]

    data = wds.WebDataset(urls, nodesplitter=wds.split_by_node, shardshuffle=len(urls), seed=1, empty_check=False)
    stages = (data, wds.shuffle(1000), lambda source: islice(source, skip // max(1, workers), None))
    pipeline = wds.DataPipeline(*stages, wds.batched(MICRO, collation_fn=batch, partial=False))
    return iter(wds.WebLoader(pipeline, batch_size=None, num_workers=workers))


def timed(batches: Iterator[PairBatch], pairs: int) -> float:
    """Pairs a second, the best of four runs: the others tell of the machine's other work."""
    next(batches)
    seconds = []
    for _ in range(4):
        started = time.perf_counter()
        for _ in range(pairs // MICRO // 4):
            next(batches)
        seconds.append(time.perf_counter() - started)
    return pairs // MICRO // 4 * MICRO / min(seconds)


def first_batch(make: Callable[[int, int], Iterator[PairBatch]], workers: int, step: int, repeats: int) -> float:
    """Seconds from asking for the loader to its first batch, the best of a few."""
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        next(make(workers, step))
        seconds.append(time.perf_counter() - started)
    return min(seconds)


class SmallStep:
    """Forward and backward of a small transformer (0.4M parameters), 1 row a side: less than any real step."""

    def __init__(self, vocabulary: int, width: int = 128, rows_per_side: int = 1):
        layer = torch.nn.TransformerEncoderLayer(width, 4, 4 * width, dropout=0.0, batch_first=True)
        self.embed = torch.nn.Embedding(vocabulary, width)
        self.layers = torch.nn.TransformerEncoder(layer, 2)
        self.rows_per_side = rows_per_side

    def __call__(self, batch: PairBatch) -> None:
        ids_RT = batch.input_ids_B2T.flatten(0, 1).repeat(self.rows_per_side, 1)
        self.layers(self.embed(ids_RT)).square().mean().backward()


def waiting_share(batches: Iterator[PairBatch], step: Callable[[PairBatch], None], count: int) -> tuple[float, float]:
    """(share of a step spent waiting for the next micro-batch, seconds of a step), of medians."""
    step(next(batches))
    waits, steps = [], []
    for _ in range(count):
        asked = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - asked)
        step(batch)
        steps.append(time.perf_counter() - asked)
    return float(np.median(waits) / np.median(steps)), float(np.median(steps))


def rates(folder: Path, encoder: Encoder, dataset, args: argparse.Namespace) -> list[dict]:
    """One row a loader and number of workers."""
    rows = []
    step = SmallStep(len(encoder.tokenizer))
    resume_step = min(RESUME_SAMPLE, args.records // 2) // GLOBAL
    makers: dict[str, Callable[[int, int], Iterator[PairBatch]]] = {
        "ours": lambda workers, step: ours(dataset, encoder, workers, step=step).__iter__(),
        "plain": lambda workers, step: plain(folder, encoder, workers, skip=step * GLOBAL),
    }
    for name, make in makers.items():
        for workers in (0, 1, 2):
            rate = timed(make(workers, 0), args.pairs)
            first = first_batch(make, workers, 0, 3)
            resumed = first_batch(make, workers, resume_step, 3 if name == "ours" else 1)
            share, seconds = waiting_share(make(workers, 0), step, args.steps)
            row = {"loader": name, "workers": workers, "pairs_per_s": round(rate), "first_batch_s": round(first, 3)}
            rows.append(
                row | {"resume_s": round(resumed, 3), "waiting_share": round(share, 5), "step_s": round(seconds, 3)}
            )
            print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def coverage(folder: Path, dataset, encoder: Encoder, world_size: int = 8) -> dict:
    """Records that each of 8 ranks gets in an epoch, counted without encoding."""
    records, steps = [], set()
    for rank in range(world_size):
        loader = ours(dataset, encoder, 0, rank=rank, world_size=world_size)
        steps.add(len(loader))
        records.append(len(loader) * GLOBAL // world_size)
    shards = sorted(folder.glob("*.tar"))
    sizes = [item["records"] for item in load_index(folder).manifest["shards"]]
    split = [sum(sizes[rank : len(shards) : world_size]) for rank in range(world_size)]
    return {
        "ours": {"steps_min": min(steps), "steps_max": max(steps), "slots": sum(records), "records": len(dataset)},
        "plain": {
            "records_min": min(split),
            "records_max": max(split),
            "lost_when_cut_to_the_least": sum(split) - 8 * min(split),
        },
    }


def padding(dataset, encoder: Encoder, steps: int = 60) -> dict:
    """Share of padding in the token rows, and the largest micro-batch over the mean, by way of forming them."""
    ways = {
        "sorted_in_step": {},
        "balanced": {"batching": "balanced"},
        "bucket_steps_16": {"bucket_steps": 16},
    }
    shares = {}
    for name, options in ways.items():
        batches = list(islice(ours(dataset, encoder, 0, **options), steps * GLOBAL // MICRO))
        kept = sum(int(batch.lengths_B2.sum()) for batch in batches)
        sizes = np.array([batch.input_ids_B2T.numel() for batch in batches])
        shares[name] = {
            "padding": round(1 - kept / sizes.sum(), 4),
            "largest_over_mean": round(sizes.max() / sizes.mean(), 2),
        }
    rows = np.concatenate([batch.lengths_B2.numpy() for batch in batches])
    np.random.default_rng(0).shuffle(rows)
    groups = rows[: len(rows) // MICRO * MICRO].reshape(-1, MICRO * 2)
    sizes = groups.max(1) * groups.shape[1]
    shares["random_micro_batches"] = {
        "padding": round(float(1 - groups.sum() / sizes.sum()), 4),
        "largest_over_mean": round(float(sizes.max() / sizes.mean()), 2),
    }
    return shares


MEMORY_PROBE = """
import sys, psutil, time
import torch, webdataset, transformers
from pathlib import Path
from itertools import islice
from data_pipeline.dataset import Part, ShardedDataset
from data_pipeline.index import load_index
from data_pipeline.order import PlanOptions
from data_pipeline.stages import Share, micro_plans
import data_pipeline.reader
def anonymous():
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous")) / 1024
before, rss = anonymous(), psutil.Process().memory_info().rss
started, cpu = time.perf_counter(), time.process_time()
dataset = ShardedDataset((Part("x", load_index(sys.argv[1])),), Path("."))
dataset.fingerprint
plans = micro_plans(dataset, PlanOptions(1, 64), Share(0, 1, 8), step=1000)
list(islice(plans, 100))
seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
print(anonymous() - before, (psutil.Process().memory_info().rss - rss) / 2**20, seconds, cpu)
"""


def memory(work: Path, records: int) -> dict:
    """What an index of so many records and the plan of an epoch cost a process, measured in a fresh one."""
    folder = work / f"index-{records}"
    if not (folder / "manifest.json").exists():
        folder.mkdir(parents=True)
        rng = np.random.default_rng(0)
        entries = np.zeros(records, ENTRY)
        for name in ("id", "content", "prompt"):
            entries[name] = rng.integers(0, 2**63, records)
        entries["key_start"], entries["key_size"] = np.arange(records) * 9, 9
        entries["chosen_bytes"] = rng.integers(10, 2000, records)
        shards = [{"name": f"s{i}.tar", "bytes": 0, "sha256": "", "records": 10_000} for i in range(records // 10_000)]
        manifest = {"schema": 1, "num_records": records, "shards": shards, "sources": [""], "bad": []}
        save_index(folder, manifest | {"fingerprint": "0" * 16}, entries, np.full(records * 9, 48, np.uint8))
    probe = [sys.executable, "-c", MEMORY_PROBE, str(folder)]
    printed = subprocess.run(probe, capture_output=True, check=True, text=True).stdout
    own, rss, seconds, cpu = map(float, printed.split())
    disk = sum(path.stat().st_size for path in folder.iterdir()) / 2**20
    return {
        "records": records,
        "own_mib": round(own, 1),
        "with_mapped_index_mib": round(rss, 1),
        "index_on_disk_mib": round(disk, 1),
        "open_and_first_plans_s": round(seconds, 3),
        "of_it_cpu_s": round(cpu, 3),
    }


HEADS = (
    "loader",
    "workers",
    "pairs/s",
    "first batch, s",
    "resume at sample 100k, s",
    "seconds a step",
    "of it waiting",
)


def table(results: dict) -> str:
    """The results as Markdown."""
    lines = ["| " + " | ".join(HEADS) + " |", "|---" * len(HEADS) + "|"]
    for row in results["rates"]:
        cells = [
            row["loader"],
            row["workers"],
            row["pairs_per_s"],
            row["first_batch_s"],
            row["resume_s"],
            row["step_s"],
        ]
        lines.append("| " + " | ".join(map(str, cells)) + f" | {row['waiting_share']:.2%} |")
    for name in ("coverage_8_ranks", "padding", "memory_of_index", "machine", "settings"):
        lines.append(f"\n{name}: `{json.dumps(results[name])}`")
    return "\n".join(lines)


def main() -> None:
    """Run everything; see the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("/tmp/diffdpo_loader_benchmark"), help="for shards; kept")
    parser.add_argument(
        "--out", type=Path, default=Path("loader.json"), help="JSON of the results; the table beside it, .md"
    )
    parser.add_argument("--records", type=int, default=210_000, help="size of the corpus")
    parser.add_argument("--pairs", type=int, default=2000, help="pairs read to measure the rate")
    parser.add_argument("--steps", type=int, default=10, help="micro-batches to measure the waiting over")
    args = parser.parse_args()
    torch.set_num_threads(1)
    args.work.mkdir(parents=True, exist_ok=True)
    folder = corpus(args.work, args.records)
    encoder = Encoder(train_tokenizer(args.work), max_length=1024)
    dataset = open_dataset(str(folder))
    results = {
        "machine": {"cpus": os.cpu_count(), "load": os.getloadavg()[0], "python": platform.python_version()},
        "settings": {"records": args.records, "micro_batch": MICRO, "global_batch": GLOBAL},
        "rates": rates(folder, encoder, dataset, args),
        "coverage_8_ranks": coverage(folder, dataset, encoder),
        "padding": padding(dataset, encoder),
        "memory_of_index": [memory(args.work, records) for records in (1_000_000, 5_000_000)],
        "memory_of_process_mib": round(psutil.Process().memory_info().rss / 2**20),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(results, indent=1) + "\n")
    page = args.out.with_suffix(".md")
    written = page.read_text() if page.exists() else ""
    _, heading, notes = written.partition("\nHow to read it")  # by hand: kept
    page.write_text("# Loader\n\n" + table(results) + "\n" + heading + notes)
    print(table(results))


if __name__ == "__main__":
    main()
