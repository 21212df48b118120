"""The data of a run: what is opened, how it is encoded, and the streams that training and evaluation read."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.batch import Fault, PairBatch
from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.encode import Encoder
from data_pipeline.facts import count_kinds, longest_text, overlap
from data_pipeline.generate import GENERATOR_VERSION, generate_corpus, generate_pairs, parse_mix, write_jsonl
from data_pipeline.names import source_names
from data_pipeline.progress import with_bar
from data_pipeline.reader import PairLoader
from data_pipeline.records import Record
from data_pipeline.stages import RecordReader
from diffdpo.config import RunConfig, SftConfig, TrainConfig
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.losses.options import LossOptions
from diffdpo.noise.estimators import MAX_EXACT_LENGTH
from diffdpo.setup.context import RunContext

GENERATED_EVAL_PAIRS, GENERATED_EVAL_SEED = 512, 0  # the same held-out problems whatever the training seed


def open_data(
    config: RunConfig, context: RunContext, generate: Callable[[Path], tuple[str, str]]
) -> tuple[ShardedDataset, ShardedDataset | None]:
    """(training data, held-out data); ``generate(cache_dir)`` gives the sources when none is named.

    One process of each host prepares what is not sharded yet (a file lock decides which), the others find it done. All
    faults of the data that can be known end here, before a model is loaded.
    """
    world = context.world
    named = (config.train_data, config.eval_data) if config.train_data else generate(context.cache_dir)
    train, held_out = (source_names(text) if text else None for text in named)
    assert train is not None, "named, or generated"
    # eval_mask is told a constant seed: which prompts are held out must not change with the training seed
    split: dict[str, Any] = {"eval_fraction": config.eval_fraction, "seed": 0} if held_out is None else {}
    options: dict[str, Any] = {"cache_dir": context.cache_dir, "progress": world.is_main}
    options |= {"allow_damaged": config.allow_damaged, "columns": config.columns}
    train_set = open_dataset(train, split="train", weights=config.weights_of_sources(), **split, **options)
    eval_set = None
    if held_out is not None:
        eval_set = open_dataset(held_out, **options)
    elif config.eval_fraction > 0:
        eval_set = open_dataset(train, split="eval", **split, **options)
    return train_set, eval_set


def generated(config: TrainConfig | SftConfig, world: World) -> Callable[[Path], tuple[str, str]]:
    """(training file, held-out file) in the cache, written once; no question stands in both.

    Preference training gets pairs, supervised training single answers of mixed quality. Held out are pairs for both,
    the same whatever the training seed.
    """
    records: Callable[..., Iterator[dict]]
    if isinstance(config, SftConfig):
        kind, count = "answers", config.num_generated_answers
        mix = parse_mix(config.answer_mix) if config.answer_mix else None
        kind += f"-{config.answer_mix}" if mix else ""
        records = partial(generate_corpus, mix=mix)
    else:
        kind, count, records = "pairs", config.num_generated_pairs, generate_pairs

    def generate(cache_dir: Path) -> tuple[str, str]:
        train = cache_dir / f"generated-v{GENERATOR_VERSION}-{kind}-{count}-seed{config.seed}.jsonl"
        held_out = cache_dir / f"generated-v{GENERATOR_VERSION}-eval-{GENERATED_EVAL_PAIRS}.jsonl"
        if not train.exists():
            drawn = records(count, seed=config.seed)
            made = with_bar(drawn, count, f"generating {kind}", unit="record", shown=world.is_main)
            write_jsonl(_each_once(made), train)
        if not held_out.exists():
            write_jsonl(generate_pairs(GENERATED_EVAL_PAIRS, seed=GENERATED_EVAL_SEED, split="eval"), held_out)
        return str(train), str(held_out)

    return generate


def _each_once(records: Iterable[dict]) -> Iterator[dict]:
    """Without those that were drawn before: data of others are told of theirs."""
    met = set()
    for record in records:
        texts = tuple(value for name, value in record.items() if isinstance(value, str) and name != "id")
        if texts not in met:
            met.add(texts)
            yield record


def train_loader(config: RunConfig, dataset: ShardedDataset, encoder: Encoder, world: World) -> PairLoader:
    """The endless training stream of this rank."""
    micro = config.per_device_train_batch_size
    return PairLoader(
        dataset,
        encoder,
        seed=config.seed,
        global_batch_size=micro * config.gradient_accumulation_steps * world.size,
        micro_batch_size=micro,
        rank=world.rank,
        world_size=world.size,
        num_workers=config.dataset_num_workers,
        tail=config.tail,
        batching=config.batching,
        shuffle_shards=config.shuffle_shards,
        bucket_steps=config.bucket_steps,
        strict=config.strict,
        max_fault_fraction=config.max_fault_fraction,
    )


def eval_batches(
    config: RunConfig, dataset: ShardedDataset | None, encoder: Encoder, world: World
) -> Sequence[PairBatch]:
    """This rank's share of the held-out records, as many batches on every rank; kept for all evaluations."""
    return [] if dataset is None else list(eval_loader(config, dataset, encoder, world))


def eval_loader(config: RunConfig, dataset: ShardedDataset, encoder: Encoder, world: World) -> PairLoader:
    """The held-out records of this rank: the first ``--max_eval_pairs`` of one order, which is drawn once and is the
    same whatever the training seed, the batch and the number of processes."""
    size = config.per_device_eval_batch_size
    return PairLoader(
        dataset,
        encoder,
        seed=0,
        global_batch_size=size * world.size,
        micro_batch_size=size,
        rank=world.rank,
        world_size=world.size,
        limit=config.max_eval_pairs,
        max_fault_fraction=config.max_fault_fraction,
    )


def held_out_records(dataset: ShardedDataset | None, batches: Sequence[PairBatch], world: World) -> list[Record]:
    """The records of all ranks' held-out batches, by number: tasks are made of them, not of their tokens."""
    own = [n for batch in batches for n, name in zip(batch.records, batch.ids, strict=True) if name]
    numbers = sorted({number for rank in world.all_gather_object(own) for number in rank})
    if dataset is None:
        return []
    reader = RecordReader(dataset)
    records = [reader(number) for number in numbers]
    reader.close()
    return [record for record in records if not isinstance(record, Fault)]


def total_steps(config: RunConfig, loader: PairLoader) -> int:
    """Optimizer steps of the run."""
    return config.max_steps if config.max_steps > 0 else max(1, round(config.num_train_epochs * len(loader)))


def check_kind_of_records(dataset: ShardedDataset, loss: LossOptions) -> None:
    """UserError when a loss of pairs is given single answers: it would train on nothing."""
    if loss.unpaired:
        return
    single = sum(
        int((np.minimum(part.column("chosen_bytes"), part.column("rejected_bytes")) == 0).sum())
        for part in dataset.parts
    )
    if single:
        raise UserError(
            f"--train_data has {single} single answers among {len(dataset)} records and --loss_type "
            f"{','.join(loss.names)} needs pairs; use --loss_type kto or data with chosen and rejected"
        )


def warn_of_data(
    config: RunConfig,
    context: RunContext,
    datasets: tuple[ShardedDataset, ShardedDataset | None],
    loss: LossOptions | None = None,
    longest: int | None = None,
) -> None:
    """Tell of what trains, and is likely a mistake. ``loss``: of preference training; ``longest``: tokens that the
    model was made for."""
    train, held_out = datasets
    kinds = count_kinds(train)
    if loss is not None and loss.unpaired and not kinds.pairs:
        if not (kinds.desirable and kinds.undesirable):
            found = "desirable" if kinds.desirable else "undesirable"
            context.print(f"warning    all {len(train)} answers are {found}: such a loss learns from the difference")
        if kinds.prompts == 1:
            context.print("warning    all records answer one prompt: there are no other prompts to compare with")
    if held_out is not None and config.eval_data and (shared := overlap(train, held_out)).prompts:
        context.print(
            f"warning    --eval_data: {shared.records} of its {shared.held_out} records, and the prompts of "
            f"{shared.prompts}, are trained on: what it measures is memory"
        )
    if longest is not None and config.max_length > longest and longest_text(train) > longest:
        context.print(f"warning    --max_length {config.max_length}: the model was made for {longest} tokens at most")


def check_exact(config: RunConfig, encoder: Encoder, datasets: Sequence[ShardedDataset | None]) -> None:
    """UserError for ``exact`` on data with an answer that it cannot enumerate. Every record is encoded: such data are
    few and short."""
    if config.score_estimator != "exact":
        return
    for dataset in filter(None, datasets):
        loader = PairLoader(dataset, encoder, seed=0, global_batch_size=64, micro_batch_size=64)
        for batch in islice(loader, len(loader)):
            length_B = (batch.lengths_B2 - batch.prompt_lengths_B2).amax(1)
            if int(length_B.max()) > MAX_EXACT_LENGTH:
                raise UserError(
                    f"--score_estimator exact: record {batch.ids[int(length_B.argmax())]!r} has an answer of "
                    f"{int(length_B.max())} tokens, {MAX_EXACT_LENGTH} are the most; use balanced"
                )


def check_batch_size(config: TrainConfig, loss: LossOptions, world: World) -> None:
    """UserError when a step of one record cannot give ``kto`` its reference point."""
    records = config.per_device_train_batch_size * config.gradient_accumulation_steps * world.size
    if loss.needs_reference_point and records < 2:
        raise UserError(
            "--loss_type kto sets the answers of a step against each other's prompts and a step has one record; raise "
            "--per_device_train_batch_size or --gradient_accumulation_steps, or use apo_zero_unpaired"
        )
