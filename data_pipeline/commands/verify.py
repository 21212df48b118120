"""``verify``: every shard against the index; what a damaged shard loses is named record by record."""

import argparse
import os
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.addresses import hidden
from data_pipeline.commands.common import check_writable
from data_pipeline.dataset import open_dataset
from data_pipeline.errors import DataError
from data_pipeline.index import MANIFEST, Index
from data_pipeline.records import Record, RecordError
from data_pipeline.remote import without_scheme
from data_pipeline.shards import TAR, describe, file_sha256, scan_shard, to_json
from data_pipeline.sources.formats import reader_of

LOST_SHOWN = 10
DESCRIBED = ("id", "content", "prompt", "prompt_bytes", "chosen_bytes", "rejected_bytes")


def run(args: argparse.Namespace) -> int:
    """Print one line a shard and the lost records of the damaged ones. 1 when anything is lost or unusable."""
    check_writable(args.json)
    reports = []
    for source in _sources(without_scheme(args.source)):
        reports += _reports(source, args.cache_dir)
    for report in reports:
        print(hidden(_line(report)))
    lost = sum(len(report["lost"]) for report in reports)
    total = sum(report["records"] for report in reports)
    bad = sum(len(report["bad"]) for report in reports)
    print(f"{len(reports)} shards, {total} indexed records: {lost} lost, {bad} faults")
    if args.json:
        args.json.write_bytes(hidden(to_json(reports).decode()).encode())
    return 1 if lost or bad else 0


def _reports(source: str, cache_dir: Path | None) -> list[dict]:
    """One report a shard; one more of what is not there, and one alone of an index that cannot be used."""
    try:
        index = open_dataset(source, cache_dir=cache_dir, allow_damaged=True).parts[0].index
    except DataError as error:
        if not (Path(source) / MANIFEST).exists():
            raise
        return [_report(source, bad=[_bad("damaged_index", str(error))])]
    if index.fresh and index.manifest["gone"] is None:
        print(f"{hidden(source)}: no earlier index to compare with; one was made of what these shards hold now")
    if "checksums" not in index.manifest:
        print(f"{hidden(source)}: the index has no checksums; build the folder again to have it checked as well")
    there = [verify_shard(index, shard, cache_dir) for shard in range(len(index.starts) - 1)]
    return there + _missing(index)


def _missing(index: Index) -> list[dict]:
    """Reports of shards that an earlier index knew, or that the numbers leave out, and that are not there."""
    gone, there = index.manifest.get("gone") or {}, {index.url(shard) for shard in range(len(index.starts) - 1)}
    known = {url: keys for url, keys in gone.items() if url not in there}
    reports = [
        _report(url, records=len(keys), lost=keys, bad=[_bad("missing_shard", "an earlier index knew it")])
        for url, keys in known.items()
    ]
    gaps = [name for name in index.manifest.get("gaps", []) if name not in known]
    return reports + [_report(name, bad=[_bad("missing_shard", "its number is left out")]) for name in gaps]


def _report(shard: str, *, records: int = 0, lost: Sequence[str] = (), bad: Sequence[dict] = ()) -> dict:
    return {"shard": shard, "records": records, "lost": list(lost), "bad": list(bad)}


def _bad(kind: str, detail: str) -> dict:
    return {"kind": kind, "key": "", "detail": detail}


def _sources(source: str) -> list[str]:
    path = Path(source)
    if path.is_file() and not source.lower().endswith(TAR):
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
        bad = [_bad("changed_shard", "records that an earlier index knew are gone or changed")]
    report = _report(index.url(shard), records=len(rows) + len(gone), lost=gone, bad=bad)
    decode = reader_of(index.manifest)
    try:
        path = index.local_shard(shard, cache_dir)
        same = file_sha256(path) == known["sha256"]
        if not same:
            found = scan_shard(path, lambda raw, told: decode(raw)).bad
            report["bad"] = [{"kind": bad.kind, "key": bad.key, "detail": bad.detail} for bad in found]
    except (OSError, DataError) as error:
        report["bad"] = [_bad("missing_shard", str(error))]
        report["lost"] += [index.key(row) for row in rows]
        return report
    with path.open("rb") as file:
        lost = [row for row in rows if not _intact(file.fileno(), index.entries[row], decode)]
    report["lost"] += [index.key(row) for row in lost]
    if same and lost:
        report["bad"].append(_bad("damaged_index", "it is not an index of this shard, which is as it was"))
    if not same and not report["bad"]:
        report["bad"] = [_bad("changed_shard", "sha256 is not that of the index")]
    return report


def _intact(descriptor: int, entry: np.void, decode: Callable[[bytes], Record]) -> bool:
    """Whether the loader would read what the index knows: the bytes, and what it says of the record in them."""
    raw = os.pread(descriptor, int(entry["size"]), int(entry["offset"]))
    if len(raw) != entry["size"] or zlib.crc32(raw) != entry["crc"]:
        return False
    try:
        told = describe(decode(raw), [])[:-1]  # all but the number of the source
    except RecordError:
        return False
    return told == tuple(entry[name].item() for name in DESCRIBED)


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
