"""Supervised training with the masked-diffusion loss: what ``launch/sft.py`` runs.

The loss of an answer is -score / tokens, with the same rows and weights (L/k for ``mask_count``) as preference scores:
response tokens only, the terminator among them, the prompt never masked (Nie et al., LLaDA, arXiv 2502.09992, eq. 5).
"""

import shutil
from collections.abc import Iterator, Sequence

from data_pipeline.batch import Fault, PairBatch
from data_pipeline.dataset import ShardedDataset
from data_pipeline.records import AnswerRecord
from data_pipeline.stages import RecordReader
from diffdpo import build
from diffdpo.build import Place
from diffdpo.train.checkpoint import find_checkpoint
from diffdpo.config import SftConfig
from diffdpo.engine.base import count_parameters
from diffdpo.engine.world import shutdown_distributed
from diffdpo.evaluation.heldout import HeldOutAnswers, SampledAnswers
from diffdpo.models.architecture.from_scratch import new_model, train_tokenizer
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.noise.estimators import check_estimator
from diffdpo.scores.reference import no_reference
from diffdpo.train.run import Job, carry_out
from diffdpo.train.answer_canvas import fill_canvas
from diffdpo.step.strategy import MicroBatchShape, choose_strategy
from diffdpo.step.step import LossOptions, PreferenceStep, StepReport

TOKENIZER_RECORDS = 20_000  # the tokenizer of a new model is trained on the first of the data


def sft(config: SftConfig) -> int:
    """Run to the end. Returns the exit code."""
    config = build.resolve(config)  # type: ignore[assignment]
    check_estimator(config.score_estimator, num_samples=config.num_mc_samples)
    place = build.find_place(config, "sft")
    try:
        build.check_ds_config(config, place.world)
        build.check_names(config)
        return _sft(config, place)
    finally:
        shutdown_distributed()


def _sft(config: SftConfig, place: Place) -> int:
    resume = find_checkpoint(config.resume_from_checkpoint, place.output_dir) if config.resume_from_checkpoint else None
    train_set, eval_set = build.open_data(config, place, build.generated(config))
    bf16 = build.resolve_bf16(config, place.world.device)
    loaded = _load_or_make(config, place, train_set, bf16=bf16)
    encoder = build.make_encoder(config, loaded.tokenizer, loaded.spec)
    loader = build.train_loader(config, train_set, encoder, place.world)
    batches = build.eval_batches(config, eval_set, encoder, place.world)
    noise = build.make_noise(config, loaded.spec)
    engine = build.make_engine(config, build.wrap(config, loaded), place, bf16=bf16)
    segments = build.choose_segments(config, place.world)
    shape = MicroBatchShape(config.per_device_train_batch_size, config.num_mc_samples, config.max_length, False)
    strategy, why = choose_strategy("auto", engine=engine, segments=segments, shape=shape)
    answers = SampledAnswers(config, engine, loaded, batches)
    held_out = HeldOutAnswers(
        engine,
        noise,
        batches,
        answers,
        segments=build.choose_segments(config, place.world, graph=False),
        limit=config.max_eval_pairs,
    )
    place.say(
        f"model    {config.model_name_or_path or 'new'}, {count_parameters(loaded.model)[0]:,} parameters\n"
        f"data     {config.train_data or 'generated arithmetic-reasoning answers'}: {len(train_set)} answers\n"
        f"engine   {engine.describe()}; segmentation '{strategy}' ({why})\n"
        f"output   {place.output_dir}"
    )
    loss = LossOptions(("sft",), (1.0,), beta=1.0)
    score_step = PreferenceStep(engine, no_reference, noise, loss, strategy=strategy, segments=segments)

    def step(micro_batches: Sequence[PairBatch], rate: float) -> StepReport:
        canvas = {"canvas": config.answer_canvas, "terminator_id": loaded.spec.terminator_id, "seed": config.seed}
        filled = [fill_canvas(b, **canvas) for b in micro_batches] if config.answer_canvas else micro_batches
        return score_step(filled, rate)

    job = Job(
        config=config,
        place=place,
        resume=resume,
        data=train_set,
        loader=loader,
        loaded=loaded,
        engine=engine,
        step=step,
        held_out=held_out,
        check_first=_nothing_to_check,
        unit="answers",
        base=config.model_name_or_path or "random weights",
    )
    return carry_out(job)


def _nothing_to_check(report: StepReport) -> None:
    """Supervised training has no reference to agree with."""


def _load_or_make(config: SftConfig, place: Place, data: ShardedDataset, *, bf16: bool) -> LoadedModel:
    """The named model, or a new one with a tokenizer trained on the data: the same on every rank."""
    if config.model_name_or_path:
        dtype = "bfloat16" if bf16 else "float32"
        loaded = load_model(config.model_name_or_path, dtype=dtype, device=build.load_device(config, place.world))
        loaded.model.requires_grad_(True)
        return loaded
    folder = place.output_dir / "start"
    if place.world.is_main and not (config.resume_from_checkpoint and folder.exists()):
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was broken off, perhaps with other settings
        tokenizer = train_tokenizer(_texts(data), vocab_size=config.vocab_size)
        model = new_model(tokenizer, width=config.width, layers=config.layers, heads=config.heads, seed=config.seed)
        partial = folder.with_name("start.partial")  # renamed when whole: an interrupted one is never taken for it
        tokenizer.save_pretrained(partial)
        model.save_pretrained(partial)
        partial.rename(folder)
    place.world.barrier()
    loaded = load_model(str(folder), device=build.load_device(config, place.world))
    loaded.model.requires_grad_(True)
    return loaded


def _texts(data: ShardedDataset) -> Iterator[str]:
    reader = RecordReader(data)
    for number in range(min(len(data), TOKENIZER_RECORDS)):
        record = reader(number)
        if not isinstance(record, Fault):
            answers = (record.answer,) if isinstance(record, AnswerRecord) else (record.chosen, record.rejected)
            for text in (record.prompt, *answers):
                yield text if isinstance(text, str) else " ".join(message["content"] for message in text)
    reader.close()
