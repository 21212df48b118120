"""``verify``: every shard against the index; what a damaged shard loses is named record by record."""

import argparse
import os
import zlib
from pathlib import Path

import numpy as np

from data_pipeline.commands.common import check_writable
from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.index import MANIFEST, Index
from data_pipeline.remote import without_scheme
from data_pipeline.shards import TAR, file_sha256, scan_shard, to_json

LOST_SHOWN = 10


def run(args: argparse.Namespace) -> int:
    """Print one line a shard and the lost records of the damaged ones. 1 when anything is lost or unusable."""
    check_writable(args.json)
    reports = []
    for source in _sources(without_scheme(args.source)):
        dataset = open_dataset(source, cache_dir=args.cache_dir, allow_damaged=True)
        index = dataset.parts[0].index
        if index.fresh and index.manifest["gone"] is None:
            print(f"{source}: no earlier index to compare with; one was made of what these shards hold now")
        reports += [verify_shard(index, shard, args.cache_dir) for shard in range(len(index.starts) - 1)]
    for report in reports:
        print(_line(report))
    lost = sum(len(report["lost"]) for report in reports)
    total = sum(report["records"] for report in reports)
    bad = sum(len(report["bad"]) for report in reports)
    print(f"{len(reports)} shards, {total} indexed records: {lost} lost, {bad} faults")
    if args.json:
        args.json.write_bytes(to_json(reports))
    return 1 if lost or bad else 0


def _sources(source: str) -> list[str]:
    path = Path(source)
    if path.is_file() and not source.endswith(TAR):
        raise DataError(f"{source} is no shard; verify takes a folder made by build, or shards ({', '.join(TAR)})")
    sides = [str(path / side) for side in ("train", "eval") if (path / side / MANIFEST).exists()]
    return [source] if (path / MANIFEST).exists() or not sides else sides


def verify_shard(index: Index, shard: int, cache_dir: Path | None) -> dict:
    """{shard, records, lost: keys of indexed records that cannot be read as they were, bad: other faults}. Records that
    an earlier index knew count as lost where they are gone."""
    known = index.manifest["shards"][shard]
    rows = range(int(index.starts[shard]), int(index.starts[shard + 1]))
    bad = [item for item in index.manifest["bad"] if item["shard"] == known["name"]]
    gone = (index.manifest.get("gone") or {}).get(index.url(shard), [])
    if gone and not bad:
        bad = [{"kind": "changed_shard", "key": "", "detail": "records that an earlier index knew are gone"}]
    report: dict = {"shard": index.url(shard), "records": len(rows) + len(gone), "lost": list(gone), "bad": bad}
    try:
        path = index.local_shard(shard, cache_dir)
        if file_sha256(path) == known["sha256"]:
            return report
        report["bad"] = [{"kind": bad.kind, "key": bad.key, "detail": bad.detail} for bad in scan_shard(path).bad]
    except (OSError, DataError) as error:
        report["bad"] = [{"kind": "missing_shard", "key": "", "detail": str(error)}]
        report["lost"] += [index.key(row) for row in rows]
        return report
    report["lost"] += [index.key(row) for row in rows if not _intact(path, index.entries[row])]
    if not report["bad"]:
        report["bad"] = [{"kind": "changed_shard", "key": "", "detail": "sha256 is not that of the index"}]
    return report


def _intact(path: Path, entry: np.void) -> bool:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        raw = os.pread(descriptor, int(entry["size"]), int(entry["offset"]))
    finally:
        os.close(descriptor)
    return len(raw) == entry["size"] and zlib.crc32(raw) == entry["crc"]


def _line(report: dict) -> str:
    if not report["lost"] and not report["bad"]:
        return f"ok      {report['shard']}: {report['records']} records"
    faults = "; ".join(
        f"{item['kind']}{' ' + item['key'] if item['key'] else ''}: {item['detail']}" for item in report["bad"][:3]
    )
    lost = report["lost"]
    names = ", ".join(lost[:LOST_SHOWN]) + (
        f" and {len(lost) - LOST_SHOWN} more (--json)" if len(lost) > LOST_SHOWN else ""
    )
    tail = f": {names}" if lost else ""
    return f"DAMAGED {report['shard']}: {faults}\n        {len(lost)} of {report['records']} records lost{tail}"
