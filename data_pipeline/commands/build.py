"""``build``: write shards with an index and say what came of it."""

import argparse
import json
import os
from dataclasses import replace
from pathlib import Path

from data_pipeline.commands.common import build_options, encoder_of
from data_pipeline.convert import told_in_a_line
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.index import MANIFEST, save_manifest
from data_pipeline.remote import without_scheme
from data_pipeline.shard_builder import build
from data_pipeline.source import expand


def run(args: argparse.Namespace) -> int:
    """Build and print a summary."""
    base = build_options(args)
    if args.max_bytes < 0 or (args.workers is not None and args.workers < 0):
        raise DataError("--max_bytes and --workers must be at least 0")
    options = replace(
        base,
        shard_size=args.shard_size,
        shuffle_seed=args.shuffle_seed,
        eval_fraction=args.eval_fraction,
        on_error=args.on_error,
        limit=args.limit,
        convert=replace(base.convert, max_bytes=args.max_bytes),
    )
    encoder = encoder_of(args)  # before the work, so that a typo shows first
    workers = len(os.sched_getaffinity(0)) if args.workers is None else args.workers
    sources = [name for source in args.source for name in (expand(without_scheme(source)) if source else [source])]
    build(sources, args.out, options, workers=workers, progress=True)
    folders = [args.out / name for name in ("train", "eval")] if args.eval_fraction else [args.out]
    for folder in folders:
        manifest = json.loads((folder / MANIFEST).read_bytes())
        if encoder is not None:
            manifest = _add_token_statistics(folder, manifest, encoder, args)
        print(f"{folder}: {manifest['num_records']} records in {len(manifest['shards'])} shards")
    report = manifest["provenance"]["report"]
    print(
        f"rows read: {report['rows']}; records: {report['records']}; fingerprint of the last: {manifest['fingerprint']}"
    )
    if told := told_in_a_line(report["told"]):
        print(told)
    for kind, item in report["dropped"].items():
        print(f"dropped, {kind}: {item['count']}" + "".join(f"\n    {place}" for place in item["examples"][:2]))
    return 0


def _add_token_statistics(folder: Path, manifest: dict, encoder: Encoder, args: argparse.Namespace) -> dict:
    from data_pipeline.commands.stats import token_figures
    from data_pipeline.dataset import open_dataset

    figures = token_figures(open_dataset(str(folder), cache_dir=args.cache_dir), encoder)[0]
    return save_manifest(folder, manifest | {"tokens": {"tokenizer": args.tokenizer, **figures}})
