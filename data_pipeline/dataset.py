"""``open_dataset``: whatever the user names as data → indexed shards, checked before any model is loaded.

A source is one of: a folder made by ``build`` (here or behind a URL), shards (glob, brace list or URLs of .tar), or
anything ``sources.files`` reads, which is built into the cache once. Several processes may do this at the same time: a
lock file lets one of them work while the others wait for its result, which appears by one rename.
"""

import hashlib
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.index import GZIP, Index
from data_pipeline.locate import open_index, open_side
from data_pipeline.order import PlanOptions, mixed_records, shuffled_records
from data_pipeline.remote import default_cache_dir, is_remote
from data_pipeline.shard_builder import BuildOptions
from data_pipeline.source import parse_source
from data_pipeline.sources.columns import parse_columns
from data_pipeline.split import eval_mask

log = logging.getLogger(__name__)

SPLITS = ("train", "eval")


@dataclass(frozen=True)
class Part:
    """One source: its index and the entries of it that are used (None: all)."""

    name: str
    index: Index
    chosen: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.index) if self.chosen is None else len(self.chosen)

    def entry(self, number: int) -> int:
        """Entry of the part's record ``number``."""
        return number if self.chosen is None else int(self.chosen[number])

    def column(self, name: str) -> np.ndarray:
        """A field of all used entries."""
        column = self.index.entries[name]
        return column if self.chosen is None else column[self.chosen]

    def shard_counts(self) -> np.ndarray:
        """Used records in each shard."""
        if self.chosen is None:
            return np.diff(self.index.starts)
        return np.diff(np.searchsorted(self.chosen, self.index.starts))


@dataclass(frozen=True)
class Opened:
    """A source before its side is chosen. ``other_side``: of a folder built with a split, where several sources are
    opened together, what it holds on the side that is not wanted."""

    name: str
    index: Index
    already_split: bool
    other_side: Index | None = None

    @property
    def prompts(self) -> np.ndarray:
        """uint64 [records]: hashes of the prompts."""
        return self.index.entries["prompt"]


@dataclass(frozen=True)
class ShardedDataset:
    """Records numbered 0 .. num_records - 1 over all parts, end to end. ``weights`` mixes the parts (None: each whole).

    With several parts record ids become ``part/id``, because ids are unique in a part only.
    """

    parts: tuple[Part, ...]
    cache_dir: Path
    weights: tuple[float, ...] | None = None

    @property
    def num_records(self) -> int:
        """Records of an epoch (the same with and without weights)."""
        return sum(map(len, self.parts))

    def __len__(self) -> int:
        return self.num_records

    @property
    def manifest(self) -> dict:
        """The manifest of the first part."""
        return self.parts[0].index.manifest

    @cached_property
    def fingerprint(self) -> str:
        """16 hex digits of ids, contents and order of all used records, and of the weights."""
        digest = hashlib.blake2b(digest_size=8)
        for part in self.parts:
            digest.update(part.index.fingerprint.encode())
            if part.chosen is not None:
                digest.update(np.ascontiguousarray(part.chosen, np.int64).tobytes())
        digest.update(json.dumps(self.weights).encode())
        return digest.hexdigest()

    @cached_property
    def lengths(self) -> np.ndarray:
        """uint32 [num_records]: bytes of the prompt and the longer answer, the stand-in for tokens."""
        columns = [
            part.column("prompt_bytes") + np.maximum(part.column("chosen_bytes"), part.column("rejected_bytes"))
            for part in self.parts
        ]
        return np.concatenate(columns)

    @cached_property
    def _starts(self) -> np.ndarray:
        return np.cumsum([0, *map(len, self.parts)])

    def locate(self, number: int) -> tuple[int, int]:
        """(part, entry of its index) of a record number."""
        part = int(np.searchsorted(self._starts, number, side="right")) - 1
        return part, self.parts[part].entry(number - int(self._starts[part]))

    @cached_property
    def shard_counts(self) -> np.ndarray:
        """int64: used records in each shard of all parts, end to end."""
        return np.concatenate([part.shard_counts() for part in self.parts])

    def sharding(self, options: PlanOptions) -> str:
        """What the order depends on besides the fingerprint: 16 hex digits of the records in each shard where shards
        are shuffled in groups, '' where the whole corpus is."""
        if self.weights is not None or not 0 < options.shuffle_shards < len(self.shard_counts):
            return ""
        return hashlib.blake2b(self.shard_counts.astype(np.int64).tobytes(), digest_size=8).hexdigest()

    def order(self, options: PlanOptions, epoch: int) -> np.ndarray:
        """All record numbers of an epoch in their order."""
        if self.weights is None:
            return shuffled_records(self.shard_counts.tolist(), options, epoch)
        return mixed_records([len(part) for part in self.parts], self.weights, options, epoch)

    @property
    def is_remote(self) -> bool:
        """True when some shard has to be fetched."""
        return any(is_remote(part.index.url(s)) for part in self.parts for s in range(len(part.index.starts) - 1))


def open_dataset(
    source: str | Sequence[str],
    *,
    cache_dir: str | Path | None = None,
    seed: int = 0,
    eval_fraction: float = 0.0,
    split: str = "train",
    weights: Sequence[float] | None = None,
    build_options: BuildOptions | None = None,
    columns: str | Mapping[str, str] | None = None,
    max_records: int = 0,
    allow_damaged: bool = False,
    workers: int | None = None,
    progress: bool = False,
) -> ShardedDataset:
    """Open one or several sources as one data set. Raises DataError, in one line, for whatever is wrong with them.

    ``eval_fraction`` of the prompts are held out for ``split="eval"``; ``seed`` chooses which (keep it when the
    training seed changes, or prompts trained on become prompts evaluated on). A folder built with its own train/eval
    split is used as it is, and its prompts stay on their sides in other sources too. ``weights``: shares of the sources
    in an epoch (0: none). ``max_records``: the first of each source. ``columns`` says which columns of rows are what
    (``sources.columns``); a folder made by ``build`` holds records, which it does not concern.
    ``allow_damaged``: go on although local shards are not as long as the index says; what they lack become faults.
    ``workers``: processes that build or index (None: one a core for large files, this one for small).
    """
    names = [source] if isinstance(source, str) else list(source)
    _check(names, split, weights, eval_fraction, max_records)
    sources = [parse_source(name) for name in names]
    cache = Path(cache_dir).expanduser() if cache_dir else default_cache_dir()
    options = build_options or BuildOptions()
    if columns:
        options = replace(options, convert=replace(options.convert, columns=parse_columns(columns)))
    options = replace(options, eval_fraction=0.0, source=replace(options.source, cache_dir=cache))
    opened = []
    for one in sources:
        index, already_split = open_index(one, cache, options, split, workers, progress)
        _check_shards(index, allow_damaged)
        other = None
        if already_split and len(sources) > 1:
            other = open_side(one, cache, "eval" if split == "train" else "train")
        opened.append(Opened(one.name, index, already_split, other))
    parts = []
    for found, chosen in zip(opened, _sides(opened, eval_fraction, split, seed), strict=True):
        if max_records:
            chosen = np.arange(len(found.index))[:max_records] if chosen is None else chosen[:max_records]
        parts.append(Part(found.name, found.index, chosen))
    for part, weight in zip(parts, weights or [1.0] * len(parts), strict=True):
        if not len(part) and (weight > 0 if weights else not any(map(len, parts))):
            raise DataError(f"{part.name}: no record is left on the {split} side; change eval_fraction or the weights")
    if weights is not None:  # a source of weight 0 has had its say on which prompts are held out, and is not read
        parts = [part for part, weight in zip(parts, weights, strict=True) if weight > 0]
        weights = [weight for weight in weights if weight > 0]
    return ShardedDataset(tuple(parts), cache, None if weights is None else tuple(map(float, weights)))


def _check(
    sources: list[str], split: str, weights: Sequence[float] | None, eval_fraction: float, max_records: int
) -> None:
    if not sources or not all(sources):
        raise DataError("no data source is named; give a file, a folder, shards or the name of a data set")
    if split not in SPLITS:
        raise DataError(f"split is {split!r}; allowed: {', '.join(SPLITS)}")
    if not 0 <= eval_fraction < 1 or max_records < 0:
        raise DataError(f"eval_fraction {eval_fraction} must be in [0, 1) and max_records {max_records} at least 0")
    if weights is not None and (len(weights) != len(sources) or min(weights) < 0 or not sum(weights) > 0):
        raise DataError(f"weights {list(weights)}: one number >= 0 for each of the {len(sources)} sources, not all 0")


def _sides(sources: list[Opened], eval_fraction: float, split: str, seed: int) -> list[np.ndarray | None]:
    """The entries of each source on the wanted side (None: all). Decided over all: a prompt may stand in several.

    A folder built with a split decides for its prompts: what one holds out is nowhere trained on.
    """
    unsplit = [source for source in sources if not source.already_split]
    if unsplit and split == "eval" and not eval_fraction:
        raise DataError("these data were not split; set eval_fraction, or build them with --eval_fraction")
    held_out, trained_on = _given_sides(sources, split)
    if unsplit and eval_fraction:
        prompts = np.concatenate([source.prompts for source in unsplit])
        drawn = eval_mask(prompts, eval_fraction, seed) & ~np.isin(prompts, trained_on)
        held_out = np.concatenate([held_out, prompts[drawn]])
    return [_side(source, held_out, eval_fraction, split) for source in sources]


def _given_sides(sources: list[Opened], split: str) -> tuple[np.ndarray, np.ndarray]:
    """(held out, trained on): the prompts of folders that were built with a split."""
    here = [source.prompts for source in sources if source.already_split]
    there = [source.other_side.entries["prompt"] for source in sources if source.other_side is not None]
    both = [np.concatenate([np.zeros(0, np.uint64), *prompts]) for prompts in (here, there)]
    return (both[1], both[0]) if split == "train" else (both[0], both[1])


def _side(source: Opened, held_out: np.ndarray, eval_fraction: float, split: str) -> np.ndarray | None:
    mine = np.isin(source.prompts, held_out) == (split == "eval")
    if eval_fraction and not source.already_split:
        return np.flatnonzero(mine)
    if mine.all():
        return None
    log.warning("%s: %d records left out: another source holds their prompts out", source.name, (~mine).sum())
    return np.flatnonzero(mine)


def _check_shards(index: Index, allow_damaged: bool) -> None:
    """Local shards must have the length the index knows; a replaced shard of the same length shows when it is read."""
    if not len(index):
        raise DataError(f"{index.base} holds no usable record")
    for number, known in enumerate(index.manifest["shards"]):
        url = index.url(number)
        if is_remote(url) or allow_damaged:
            continue
        path = Path(url)
        found = path.stat().st_size if path.exists() else None
        if found != known["bytes"] and not url.endswith(GZIP):
            what = "is missing" if found is None else f"has {found} bytes, the index says {known['bytes']}"
            raise DataError(
                f"shard {url} {what}; restore it, build again, see what is lost with `python -m data_pipeline verify "
                f"{shlex.quote(str(path.parent))}`, or go on without it (--allow_damaged)"
            )
