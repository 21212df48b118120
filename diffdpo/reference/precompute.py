"""Reference mode ``precomputed``: all rows of the run scored once, before training, by a model that then leaves memory.

The rows are those of training: the same readers, micro-batches, noise and segments, so the numbers are those that mode
``copy`` would have computed, to the bit on one machine. What is scored already is found in the cache and skipped, by
the step; so a pass that was killed goes on, and a longer run adds to a shorter one's scores.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.batch import PairBatch
from data_pipeline.encode import Encoder
from data_pipeline.order import as_steps
from data_pipeline.progress import bar_of
from data_pipeline.reader import PairLoader
from diffdpo.config import TrainConfig
from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.make import hold_frozen
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.memory.exhausted import release_memory, told_if_exhausted
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.load import dtype_name
from diffdpo.noise.options import NoiseOptions
from diffdpo.noise.rows import NoisyRows
from diffdpo.reference.identity import fingerprint, identity_of, weights_digest
from diffdpo.reference.modes import load_reference
from diffdpo.reference.store import Part, ScoreStore, make_folder, open_store
from diffdpo.scores.reference import Reference
from diffdpo.scores.rows import score_rows
from diffdpo.scores.segments import Segments, make_segments

FOLDER = "reference_scores"
PART_RECORDS = 256  # about how many a part holds: what a kill can cost


@dataclass(frozen=True)
class Stream:
    """Batches that need reference scores: steps ``first`` to ``last`` of a reader, counted over epochs.

    ``shapes`` of the forwards: scores made in others may differ in their last bits.
    """

    loader: PairLoader
    store: ScoreStore
    shapes: dict[str, Any]
    first: int
    last: int

    def epochs(self) -> range:
        """The epochs these steps lie in."""
        return range(self.first // len(self.loader), -(-self.last // len(self.loader)))


@dataclass(frozen=True)
class Precomputed:
    """The references of training and of evaluation, and what there is to say of them."""

    train: Reference
    held_out: Reference
    text: str


class ReferencePass:
    """Scoring a run's records under its reference, which is in memory during :meth:`score` only.

    ``cache_dir``: where scores are kept unless ``--reference_cache`` names a folder. ``say`` tells the user.
    """

    def __init__(
        self,
        config: TrainConfig,
        choice: EngineChoice,
        world: World,
        *,
        encoder: Encoder,
        spec: FamilySpec,
        cache_dir: Path,
        say: Callable[[str], None],
    ):
        self.config, self.choice, self.world = config, choice, world
        self.encoder, self.spec, self.cache_dir, self.say = encoder, spec, cache_dir, say
        self.noise = NoiseOptions.of(config, spec, ld_alpha=config.ld_alpha)
        self.segments = make_segments(config, choice, world.device, world=world)
        adapter = None if config.ref_model_name_or_path else config.adapter_name_or_path
        self.reference = config.ref_model_name_or_path or adapter or model_or_bundled(config.policy)
        base = config.policy if adapter else None
        self.weights = world.broadcast(weights_digest(self.reference, base=base) if world.is_main else None)

    def training(self, loader: PairLoader, *, last: int) -> Stream:
        """What the run trains on from where the loader stands, to step ``last``."""
        first = loader.epoch * len(loader) + loader.step
        shapes = shapes_of(loader, self.segments, self.world.device)
        return Stream(loader, self._store("train", loader), shapes, first, last)

    def held_out(self, loader: PairLoader) -> Stream:
        """What evaluations score. Parts of other shapes are not used: an evaluation must find margins of exactly 0
        before training, and its pairs are few."""
        shapes = shapes_of(loader, self.segments, self.world.device)
        return Stream(loader, self._store("held_out", loader, shapes), shapes, 0, len(loader))

    def _store(self, name: str, loader: PairLoader, shapes: dict[str, Any] | None = None) -> ScoreStore:
        quantised = self.config.load_in_4bit and not self.config.ref_model_name_or_path
        dtype = dtype_name(self.choice.bf16)
        identity = identity_of(
            weights=self.weights,
            dtype=f"nf4 {dtype}" if quantised else dtype,
            encoder=self.encoder,
            spec=self.spec,
            noise=self.noise,
            data_fingerprint=loader.dataset.fingerprint,
        )
        if self.config.reference_cache:
            folder = Path(self.config.reference_cache).resolve() / name
        else:
            folder = self.cache_dir / FOLDER / f"{fingerprint(identity)}-{name}"
        if self.world.local_rank == 0:
            make_folder(folder, identity, about={"reference": self.reference})
        self.world.barrier()
        return open_store(folder, identity, shapes=shapes)

    def complete(self, streams: Sequence[Stream]) -> Precomputed:
        """Score what the streams still lack; every rank calls. The first is that of training, the last what
        evaluations read."""
        todo = [(s, epoch, steps) for s in streams for epoch, steps in missing_steps(s, self.world, self.say)]
        if todo:
            self.score(todo)
        return _result(streams, self.say)

    def score(self, todo: Sequence[tuple[Stream, int, np.ndarray]]) -> None:
        """Load the reference, score the steps, let go of it."""
        module = load_reference(self.config, self.choice, self.world, mask_token_id=self.spec.mask_token_id)
        forward = hold_frozen(self.choice, module, self.world)
        with told_if_exhausted("while the reference is scored", "give a smaller --segment_rows, such as 8"):
            _score_all(todo, forward, self.noise, self.world, segments=self.segments)
        forward.release()
        del module, forward
        release_memory()


def shapes_of(loader: PairLoader, segments: Segments, device: torch.device) -> dict[str, Any]:
    """What besides its identity the last bits of a score depend on."""
    share = loader.share
    sizes = {"processes": share.world_size, "micro_batch": share.micro_batch_size}
    return sizes | segments.sizes() | {"device": device.type}


def missing_steps(stream: Stream, world: World, say: Callable[[str], None]) -> list[tuple[int, np.ndarray]]:
    """(epoch, steps of it) in portions of about PART_RECORDS records: what some host has no scores of."""
    loader, portions = stream.loader, []
    for epoch in stream.epochs():
        options, dataset = loader.options, loader.dataset
        records_SG = as_steps(dataset.order(options, epoch), options, epoch, dataset.lengths)
        known = np.append(stream.store.known(epoch, len(dataset)), True)  # the last for PAD = -1
        first, last = (min(max(0, step - epoch * len(loader)), len(loader)) for step in (stream.first, stream.last))
        lacking_S = torch.from_numpy(~known[records_SG[first:last]].all(1)).long()
        steps = first + np.flatnonzero(world.all_reduce_sum(lacking_S.to(world.device)).cpu().numpy())
        for line in stream.store.damaged(epoch):
            say(f"reference  {line}; it is removed, and what the run needs of it is scored again")
        if world.local_rank == 0:  # the sum above was the last to need it on this host
            stream.store.remove_damaged(epoch)
        size = max(1, PART_RECORDS // options.global_batch_size)
        portions += [(epoch, steps[start : start + size]) for start in range(0, len(steps), size)]
    return portions


def _score_all(
    todo: Sequence[tuple[Stream, int, np.ndarray]],
    forward: Callable[..., torch.Tensor],
    noise: NoiseOptions,
    world: World,
    *,
    segments: Segments,
) -> None:
    total = sum(len(steps) * stream.loader.options.global_batch_size for stream, _, steps in todo)
    bar = bar_of(total, "reference", unit="pair", shown=world.is_main)
    with bar:
        for stream, epoch, steps in todo:
            pieces = [_nothing(stream.shapes)]
            for step in steps.tolist():
                for batch in _step(stream.loader, epoch, step):
                    rows = noise.draw_rows(batch, world.device)
                    f_R = score_rows(forward, rows, segments=segments)
                    pieces.append(part_of(batch, rows, f_R, stream.shapes))
                bar.update(stream.loader.options.global_batch_size)
            part = Part.of([piece for of_rank in world.all_gather_object(pieces) for piece in of_rank])
            check_finite(part)  # of all ranks, so that all end
            if world.local_rank == 0:
                size = stream.loader.options.global_batch_size
                stream.store.add(epoch, f"{steps[0]:08d}-{steps[-1]:08d}-of-{size}", part)
    world.barrier()
    for stream, _, _ in todo:
        stream.loader.close()
        stream.store.forget()


def check_finite(part: Part) -> None:
    """UserError that counts the records without a finite score: kept, they would end every run at its first step."""
    at_fault_R = ~np.isfinite(part.f_R)
    if at_fault_R.any():
        faulty = np.unique(np.repeat(part.records_P, part.counts_P)[at_fault_R])
        raise UserError(
            f"the reference gives no finite score to {len(faulty)} of {len(part.records_P)} records (the first: number "
            f"{faulty[0]}); its weights are damaged or diverged, or overflow in 16 bits; nothing of them is kept"
        )


def _step(loader: PairLoader, epoch: int, step: int) -> list[PairBatch]:
    """This rank's micro-batches of one step; reading goes straight on from step to step."""
    loader.epoch, loader.step = epoch, step
    return next(loader.steps())


def part_of(batch: PairBatch, rows: NoisyRows, f_R: torch.Tensor, made_with: dict[str, Any]) -> Part:
    """The scores of a micro-batch by record. Empty slots are left out; a record without an answer has no rows."""
    counts_B, present_B = rows_a_slot(batch, rows)
    records_B = np.asarray(batch.records, np.int64)
    kept = np.repeat(present_B, counts_B)
    filled_B = records_B >= 0
    counts_B = np.where(present_B, counts_B, 0)
    return Part(records_B[filled_B], counts_B[filled_B], f_R.cpu().numpy()[kept], made_with)


def rows_a_slot(batch: PairBatch, rows: NoisyRows) -> tuple[np.ndarray, np.ndarray]:
    """(counts_B rows of both sides, present_B whether there is something to score)."""
    counts_A = np.bincount(rows.answer_R.cpu().numpy(), minlength=rows.num_answers)
    return counts_A.reshape(-1, 2).sum(1), (batch.weight_B2.sum(1) > 0).numpy()


def _nothing(made_with: dict[str, Any]) -> Part:
    return Part(np.zeros(0, np.int64), np.zeros(0, np.int32), np.zeros(0, np.float32), made_with)


def stored_reference(store: ScoreStore) -> Reference:
    """Scores looked up by record, instead of computed."""

    def score(rows: NoisyRows, batch: PairBatch) -> torch.Tensor:
        counts_B, present_B = rows_a_slot(batch, rows)
        f_R = store.lookup(batch.epoch, batch.records, counts_B, present_B)
        return torch.from_numpy(f_R).to(rows.lengths_R.device)

    return score


def _result(streams: Sequence[Stream], say: Callable[[str], None]) -> Precomputed:
    train = streams[0]
    others = [made for epoch in train.epochs() for made in train.store.made_with(epoch) if made != train.shapes]
    if others:
        say(
            f"reference  NOTE scores made in other shapes are used; they differ in their last bits: {others[0]}, here "
            f"{train.shapes}"
        )
    references = [stored_reference(stream.store) for stream in streams]
    text = f"precomputed scores in {train.store.folder}"
    return Precomputed(references[0], references[-1], text)
