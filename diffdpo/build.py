"""From settings to the parts of a run: processes, data, models, engine. One function a part, in order of the flow."""

import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from data_pipeline.batch import PairBatch
from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.encode import Encoder, default_template
from data_pipeline.generate import GENERATOR_VERSION, generate_corpus, generate_pairs, parse_mix, write_jsonl
from data_pipeline.locate import check_rows
from data_pipeline.names import source_names
from data_pipeline.reader import PairLoader
from diffdpo.config import RunConfig, SftConfig, TrainConfig, data_weights
from diffdpo.ds_config import read_ds_config
from diffdpo.engine.base import Engine, OptimizerOptions
from diffdpo.engine.deepspeed import (
    DeepSpeedEngine,
    complete_ds_config,
    freeze,
    why_not_whole_gradients,
    zero_stage,
)
from diffdpo.engine.operators import prepare_operators
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.preflight import check_nvme, check_values, check_zeropp
from diffdpo.engine.world import World, join_world
from diffdpo.errors import UserError
from diffdpo.losses.preference import DEFAULTS, check_loss, check_read
from diffdpo.memory.allocator import keep_freed_memory
from diffdpo.models.load import LoadedModel, empty_model, load_tokenizer_and_spec
from diffdpo.models.lora_targets import target_pattern
from diffdpo.models.spec import FamilySpec
from diffdpo.noise.estimators import MAX_EXACT_LENGTH
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.step.choose import check_deferred
from diffdpo.step.coefficient import CoefficientRows
from diffdpo.step.segments import Segments
from diffdpo.step.train_step import LossOptions
from diffdpo.tracking.run import tracking_uri

BUNDLED_MODEL = Path(__file__).parent / "pretrained" / "arithmetic"
GENERATED_EVAL_PAIRS, GENERATED_EVAL_SEED = 512, 0  # the same held-out problems whatever the training seed
FULL_RATE, LORA_RATE, BUNDLED_RATE = 5e-7, 5e-6, 1e-4  # VRPO's for 8B; the usual tenfold for LoRA; for 1M parameters
SEGMENT_TOKENS = {"cpu": 8192, "cuda": 16384}  # tokens of a forward that segments are cut to by default


@dataclass(frozen=True)
class Place:
    """Where a run happens: its processes and its folder."""

    world: World
    output_dir: Path
    cache_dir: Path
    run_name: str

    def say(self, text: str) -> None:
        """Tell the user, once."""
        if self.world.is_main:
            print(text, flush=True)


def find_place(config: RunConfig, command: str) -> Place:
    """Join the other processes and agree on a name and a folder. UserError when the folder holds another run."""
    _set_threads()
    world = join_world(always_distributed=uses_deepspeed(config))
    if world.device.type == "cpu":
        keep_freed_memory()
    name = world.same_for_all(config.run_name or f"{command}-{time.strftime('%Y%m%d-%H%M%S')}")
    output_dir = Path(config.output_dir or Path("outputs") / name).resolve()
    _check_output_dir(output_dir, config.resume_from_checkpoint)
    tracking_uri(config.tracking_uri, output_dir)  # a wrong one is refused here, before a model is loaded
    world.wait()  # no rank may write there before all have looked
    cache_dir = Path(config.data_cache_dir) if config.data_cache_dir else output_dir.parent / "data_cache"
    return Place(world, output_dir, cache_dir, name)


def _check_output_dir(output_dir: Path, resume: str | None) -> None:
    """The folder is made when the run's record begins: a mistake met before leaves nothing behind."""
    if (output_dir / "metrics.jsonl").exists():
        if not resume:
            raise UserError(
                f"--output_dir {output_dir} holds a run already; give another, or "
                "--resume_from_checkpoint latest to go on"
            )
        if resume != "latest" and output_dir not in Path(resume).resolve().parents:
            raise UserError(
                f"--output_dir {output_dir} holds a run already and --resume_from_checkpoint {resume} is of another; "
                "give a new --output_dir, or that run's"
            )
    existing = next(folder for folder in (output_dir, *output_dir.parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        why = "is not writable" if existing.is_dir() else "is not a folder"
        raise UserError(f"--output_dir {output_dir} cannot be made: {existing} {why}; give another")


def _set_threads() -> None:
    """Several processes share the cores of a host; each taking all of them makes every one crawl."""
    local = int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or 1)
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // local))


def uses_deepspeed(config: RunConfig) -> bool:
    """What ``--engine`` comes to."""
    return config.engine == "deepspeed" or (config.engine == "auto" and config.ds_config is not None)


# ------------------------------------------------------------------------------------------------- data


def open_data(
    config: RunConfig, place: Place, generate: Callable[[Path], tuple[str, str]]
) -> tuple[ShardedDataset, ShardedDataset | None]:
    """(training data, held-out data); ``generate(cache_dir)`` gives the sources when none is named.

    One process of each host prepares what is not sharded yet (a file lock decides which), the others find it done. All
    faults of the data that can be known end here, before a model is loaded.
    """
    world = place.world
    named = (config.train_data, config.eval_data) if config.train_data else generate(place.cache_dir)
    train, held_out = (source_names(text) if text else None for text in named)
    assert train is not None, "named, or generated"
    # eval_mask is told a constant seed: which prompts are held out must not change with the training seed
    split: dict[str, Any] = {"eval_fraction": config.eval_fraction, "seed": 0} if held_out is None else {}
    options: dict[str, Any] = {"cache_dir": place.cache_dir, "progress": world.is_main}
    options["allow_damaged"] = config.allow_damaged
    train_set = open_dataset(train, split="train", weights=data_weights(config), **split, **options)
    eval_set = None
    if held_out is not None:
        eval_set = open_dataset(held_out, **options)
    elif config.eval_fraction > 0:
        eval_set = open_dataset(train, split="eval", **split, **options)
    return train_set, eval_set


def check_kind_of_records(dataset: ShardedDataset, loss: LossOptions) -> None:
    """UserError when a loss of pairs is given single answers: it would train on nothing."""
    if loss.of_answers:
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


def check_exact(config: TrainConfig, datasets: Sequence[ShardedDataset | None]) -> None:
    """UserError for ``exact`` on data with an answer that it cannot enumerate. Every record is encoded: such data are
    few and short."""
    if config.score_estimator != "exact":
        return
    tokenizer, spec = load_tokenizer_and_spec(config.model_name_or_path or str(BUNDLED_MODEL))
    encoder = make_encoder(config, tokenizer, spec)
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
    if loss.needs_kl and records < 2:
        raise UserError(
            "--loss_type kto sets the answers of a step against each other's prompts and a step has one record; raise "
            "--per_device_train_batch_size or --gradient_accumulation_steps, or use apo_zero_unpaired"
        )


def generated(config: TrainConfig | SftConfig) -> Callable[[Path], tuple[str, str]]:
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
            write_jsonl(records(count, seed=config.seed), train)
        if not held_out.exists():
            write_jsonl(generate_pairs(GENERATED_EVAL_PAIRS, seed=GENERATED_EVAL_SEED, split="eval"), held_out)
        return str(train), str(held_out)

    return generate


def make_encoder(config: RunConfig, tokenizer, spec: FamilySpec) -> Encoder:
    """Text to tokens by the family's habits; `python -m data_pipeline inspect` shows the same."""
    template = getattr(config, "template", None)  # `launch/score.py` has no such flag
    return Encoder(
        tokenizer,
        max_length=config.max_length,
        max_prompt_length=config.max_prompt_length,
        truncation=config.truncation,
        answer_truncation=config.answer_truncation,
        template=template or default_template(tokenizer),
        terminator=spec.terminator_id,
        forbidden_ids=(spec.mask_token_id,),
    )


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
    if dataset is None:
        return []
    loader = eval_loader(config, dataset, encoder, world)
    return list(islice(loader, eval_steps(config, loader)))


def eval_loader(config: RunConfig, dataset: ShardedDataset, encoder: Encoder, world: World) -> PairLoader:
    """The held-out records of this rank: the same order whatever the training seed."""
    size = config.per_device_eval_batch_size
    return PairLoader(
        dataset,
        encoder,
        seed=0,
        global_batch_size=size * world.size,
        micro_batch_size=size,
        rank=world.rank,
        world_size=world.size,
        max_fault_fraction=config.max_fault_fraction,
    )


def eval_steps(config: RunConfig, loader: PairLoader) -> int:
    """Batches of each rank that ``--max_eval_pairs`` comes to."""
    size = loader.options.global_batch_size
    return min(-(-config.max_eval_pairs // size) or len(loader), len(loader))


def total_steps(config: RunConfig, loader: PairLoader) -> int:
    """Optimizer steps of the run."""
    return config.max_steps if config.max_steps > 0 else max(1, round(config.num_train_epochs * len(loader)))


# ------------------------------------------------------------------------------------------------- model


def resolve_bf16(config: RunConfig, device: torch.device) -> bool:
    """``--bf16``, or whether the hardware has it."""
    return choose_bf16(config, able=device.type == "cuda" and torch.cuda.is_bf16_supported())


def choose_bf16(config: RunConfig, *, able: bool) -> bool:
    """``--bf16``, or ``able``. The plain engine has no fp32 master weights, so it trains in fp32."""
    if not uses_deepspeed(config):
        if config.bf16:
            raise UserError("--bf16 trains bfloat16 weights with fp32 masters, which needs --ds_config; leave it out")
        return False
    in_json = read_ds_config(Path(config.ds_config or "")).get("bf16", {}).get("enabled", "auto")
    if in_json == "auto":
        return able if config.bf16 is None else config.bf16
    if config.bf16 is not None and config.bf16 is not in_json:
        raise UserError(f"--bf16 is {config.bf16} and --ds_config sets bf16.enabled to {in_json}; leave one out")
    return in_json


def load_device(config: RunConfig, world: World) -> str:
    """Where weights are read to: under ZeRO-3 to the host, from where they go to the devices in shards."""
    sharded = uses_deepspeed(config) and zero_stage(read_ds_config(Path(config.ds_config or ""))) == 3
    return "cpu" if sharded else str(world.device)


def check_ds_config(config: RunConfig, world: World) -> None:
    """UserError for what --ds_config asks of this host in vain, and for ``--segmentation deferred`` where it speaks
    against that, as far as is known before the model is."""
    if not uses_deepspeed(config):
        return
    ds_config = read_ds_config(Path(config.ds_config or ""))
    check_values(_completed_ds_config(config, world, bf16=resolve_bf16(config, world.device)))
    check_nvme(ds_config)
    check_zeropp(ds_config, world_size=world.size, cuda=world.device.type == "cuda")
    if isinstance(config, TrainConfig):
        check_deferred(config.segmentation, why_not_whole_gradients(ds_config, world.size, few=config.use_peft))


def check_names(config: RunConfig) -> None:
    """What is wrong with named data at first sight (DataError), and a named model without a config or tokenizer to read
    or without the modules that LoRA is to adapt (UserError), before all the data are prepared."""
    for text in (config.train_data, config.eval_data):
        for source in source_names(text) if text else ():
            check_rows(source)
    for name in (config.model_name_or_path, getattr(config, "ref_model_name_or_path", None)):
        if name:
            load_tokenizer_and_spec(name)
    if isinstance(config, TrainConfig) and config.lora_target_modules:
        policy = config.model_name_or_path or str(BUNDLED_MODEL)
        target_pattern(empty_model(policy), load_tokenizer_and_spec(policy)[1], config.lora_target_modules)


def wrap(config: RunConfig, loaded: LoadedModel) -> MaskedLogProbs:
    """The module that engines hold: log-probabilities at masked positions."""
    return MaskedLogProbs(
        loaded.model,
        loaded.spec,
        layer_checkpointing=config.gradient_checkpointing,
        use_liger=config.use_liger_kernel,
        compile_blocks=config.torch_compile,
    )


def make_engine(config: RunConfig, module: nn.Module, place: Place, *, bf16: bool) -> Engine:
    """The policy under DeepSpeed or on its own."""
    options = _optimizer_options(config)
    if not uses_deepspeed(config):
        return PlainEngine(module, place.world, options)
    ds_config = read_ds_config(Path(config.ds_config or ""))
    prepare_operators(ds_config, place.world, place.say)
    return DeepSpeedEngine(
        module,
        place.world,
        options,
        ds_config=ds_config,
        micro_batch_size=config.per_device_train_batch_size,
        accumulation_steps=config.gradient_accumulation_steps,
        bf16=bf16,
    )


def _optimizer_options(config: RunConfig) -> OptimizerOptions:
    assert config.learning_rate is not None, "resolve has chosen one"
    return OptimizerOptions(
        learning_rate=config.learning_rate,
        weight_decay=config.weight_decay,
        betas=(config.adam_beta1, config.adam_beta2),
        epsilon=config.adam_epsilon,
        max_grad_norm=config.max_grad_norm,
    )


def hold_frozen(config: RunConfig, module: nn.Module, place: Place, *, bf16: bool) -> Callable[..., torch.Tensor]:
    """A module that is never trained, held as the engine would hold it; ``engine.deepspeed.release`` lets go of it."""
    if not uses_deepspeed(config):
        return module.to(place.world.device).eval().requires_grad_(False)
    return freeze(module, place.world, _completed_ds_config(config, place.world, bf16=bf16))


def _completed_ds_config(config: RunConfig, world: World, *, bf16: bool) -> dict[str, Any]:
    return complete_ds_config(
        read_ds_config(Path(config.ds_config or "")),
        _optimizer_options(config),
        micro_batch_size=config.per_device_train_batch_size,
        accumulation_steps=config.gradient_accumulation_steps,
        world_size=world.size,
        bf16=bf16,
        cuda=world.device.type == "cuda",
    )


# ------------------------------------------------------------------------------------------------- step


def make_loss(config: TrainConfig) -> LossOptions:
    """``--loss_type``, ``--loss_weights`` and ``--sft_weight`` as one sum of losses."""
    names = tuple(name.strip() for name in config.loss_type.split(","))
    try:
        weights = (
            tuple(float(w) for w in config.loss_weights.split(",")) if config.loss_weights else (1.0,) * len(names)
        )
    except ValueError:
        raise UserError(f"--loss_weights {config.loss_weights}: give numbers with commas, such as 1.0,0.05") from None
    if not all(math.isfinite(weight) for weight in weights):
        raise UserError(f"--loss_weights {config.loss_weights}: every weight must be a finite number")
    if config.sft_weight and "sft" in names:
        raise UserError("--sft_weight adds the sft loss that --loss_type names already; use one of the two")
    parameters = {name: getattr(config, name) for name in DEFAULTS}
    check_loss(names, weights=weights, label_smoothing=config.label_smoothing, discopop_tau=config.discopop_tau)
    check_read(names, parameters)
    if config.sft_weight:
        names, weights = (*names, "sft"), (*weights, config.sft_weight)
    return LossOptions(names, weights, beta=config.beta, **parameters)


def make_coefficient(config: TrainConfig, loss: LossOptions) -> CoefficientRows:
    """Where dL/dS is taken. UserError for a loss of the whole step, whose scores come before any gradient."""
    if config.coefficient_rows != "same" and loss.whole_batch:
        raise UserError(
            f"--coefficient_rows {config.coefficient_rows}: {','.join(loss.names)} couples the pairs of a step"
        )
    return CoefficientRows(config.coefficient_rows, config.num_coefficient_samples or config.num_mc_samples)


def make_noise(config: RunConfig, spec: FamilySpec) -> NoiseOptions:
    """How rows are drawn."""
    steps = getattr(config, "num_diffusion_steps", None)
    return NoiseOptions(config.score_estimator, config.num_mc_samples, config.seed, spec.mask_token_id, steps)


def choose_segments(config: RunConfig, world: World, *, graph: bool = True) -> Segments:
    """How rows are cut into forwards: ``--segment_rows``, or as many as keep a forward to a number of tokens.

    Without a ``graph`` processes meet in forwards of sharded weights alone, with one in backwards as well.
    """
    least = 2 if graph else 3
    sharded = uses_deepspeed(config) and zero_stage(read_ds_config(Path(config.ds_config or ""))) >= least
    return Segments(
        rows=getattr(config, "segment_rows", 0),
        tokens=SEGMENT_TOKENS[world.device.type],
        equal_over=world if sharded and world.size > 1 else None,
    )


def micro_batch_is_free(config: TrainConfig) -> bool:
    """Whether ``--max_memory`` may choose it: no --ds_config fixes it, and ``deferred`` goes by the answer."""
    sizes = read_ds_config(Path(config.ds_config)) if config.ds_config else {}
    names = ("train_micro_batch_size_per_gpu", "gradient_accumulation_steps")
    return config.segmentation != "deferred" and all(sizes.get(name, "auto") == "auto" for name in names)


def with_micro_batch(config: TrainConfig, pairs: int) -> TrainConfig:
    """The same step in micro-batches of so many pairs, a divisor of its own."""
    own = config.per_device_train_batch_size * config.gradient_accumulation_steps
    return replace(config, per_device_train_batch_size=pairs, gradient_accumulation_steps=own // pairs)


def resolve(config: RunConfig) -> RunConfig:
    """The learning rate, where none is given, follows what is trained."""
    if config.learning_rate is not None:
        return config
    if isinstance(config, TrainConfig) and config.use_peft:
        return replace(config, learning_rate=LORA_RATE)
    return replace(config, learning_rate=FULL_RATE if config.model_name_or_path else BUNDLED_RATE)


def save_final(folder: Path, engine: Engine, loaded: LoadedModel) -> None:
    """Weights (or adapter) and tokenizer in the published layout. Every rank calls; rank 0 writes."""
    weights = engine.full_state_dict()
    if weights is None:
        return
    prefix = "model."  # of the scoring module that the engine holds
    state = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    loaded.model.save_pretrained(folder, state_dict=state)  # type: ignore[operator]
    loaded.tokenizer.save_pretrained(folder)
