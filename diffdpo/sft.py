"""Supervised training with the masked-diffusion loss: what ``launch/sft.py`` runs.

The loss of an answer is -score / tokens, with the same rows and weights (L/k for ``mask_count``) as preference scores:
response tokens only, the terminator among them, the prompt never masked (Nie et al., LLaDA, arXiv 2502.09992, eq. 5).
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict

from data_pipeline.batch import Fault, PairBatch
from data_pipeline.dataset import ShardedDataset
from data_pipeline.records import AnswerRecord
from data_pipeline.stream import RecordReader
from diffdpo import build
from diffdpo.build import Place
from diffdpo.checkpoint import find_checkpoint, read_state
from diffdpo.config import SftConfig, to_yaml
from diffdpo.engine.world import leave_world
from diffdpo.evaluation.heldout import HeldOutAnswers, SampledAnswers
from diffdpo.loop import Loop
from diffdpo.models.from_scratch import new_model, train_tokenizer
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.noise.estimators import check_estimator
from diffdpo.report import Evaluation
from diffdpo.run import finish, resume_parts, start_tracking
from diffdpo.step.backward import choose_strategy
from diffdpo.step.canvas import fill_canvas
from diffdpo.step.reference import no_reference
from diffdpo.step.train_step import LossOptions, PreferenceStep, StepReport

TOKENIZER_RECORDS = 20_000  # the tokenizer of a new model is trained on the first of the data


def sft(config: SftConfig) -> int:
    """Run to the end. Returns the exit code."""
    config = build.resolve(config)  # type: ignore[assignment]
    check_estimator(config.score_estimator, num_samples=config.num_mc_samples)
    place = build.find_place(config, "sft")
    try:
        return _sft(config, place)
    finally:
        leave_world()


def _sft(config: SftConfig, place: Place) -> int:
    resume = find_checkpoint(config.resume_from_checkpoint, place.output_dir) if config.resume_from_checkpoint else None
    train_set, eval_set = build.open_data(config, place, build.generated(config))
    bf16 = build.resolve_bf16(config, place.world.device)
    loaded = _load_or_make(config, place, train_set, bf16=bf16)
    encoder = build.make_encoder(config, loaded.tokenizer, loaded.spec)
    loader = build.train_loader(config, train_set, encoder, place.world)
    batches = build.eval_batches(config, eval_set, encoder, place.world)
    noise, segment_rows = build.make_noise(config, loaded.spec), build.choose_segment_rows(config, place.world.device)
    engine = build.make_engine(config, build.wrap(config, loaded), place, bf16=bf16)
    strategy, why = choose_strategy(
        "auto",
        rows=2 * config.num_mc_samples * config.per_device_train_batch_size,
        segment_rows=segment_rows,
        keeps_gradients_sharded=engine.keeps_gradients_sharded,
        whole_batch=False,
    )
    answers = SampledAnswers(config, engine, loaded, batches)
    held_out = HeldOutAnswers(engine, noise, batches, answers, segment_rows=segment_rows, limit=config.max_eval_pairs)
    total = sum(p.numel() for p in loaded.model.parameters())
    place.say(
        f"model    {config.model_name_or_path or 'new'}, {total:,} parameters\n"
        f"data     {config.train_data or 'generated arithmetic-reasoning answers'}: {len(train_set)} answers\n"
        f"engine   {engine.describe()}; segmentation '{strategy}' ({why})\n"
        f"output   {place.output_dir}"
    )
    state = read_state(resume) if resume else {}
    extra = {"data_fingerprint": train_set.fingerprint}
    if resume:
        resume_parts(config, place, resume, engine, loader)
    tracking = start_tracking(config, place, resume_step=state.get("step"), extra=extra)
    with finish(place, tracking) as end:
        before = Evaluation(state["before"]) if resume else held_out.evaluate("before")
        score_step = PreferenceStep(
            engine,
            no_reference,
            noise,
            LossOptions(("sft",), (1.0,), beta=1.0),
            strategy=strategy,
            segment_rows=segment_rows,
        )

        def step(micro_batches: Sequence[PairBatch], rate: float) -> StepReport:
            canvas = {"canvas": config.answer_canvas, "terminator_id": loaded.spec.terminator_id, "seed": config.seed}
            filled = [fill_canvas(b, **canvas) for b in micro_batches] if config.answer_canvas else micro_batches
            return score_step(filled, rate)

        loop = Loop(
            config=config,
            output_dir=place.output_dir,
            engine=engine,
            loader=loader,
            step=step,
            total_steps=build.total_steps(config, loader),
            journal=tracking.journal if tracking else None,
            evaluate=held_out.quick,
            check_first=_nothing_to_check,
            unit="answers",
            state={"before": dict(before.values), "config": asdict(config)},
            done=state.get("step", 0),
        )
        if not resume:
            loop.record_evaluation(before.means())
        if not loop.run():
            end.stopped(loop.done)
            return 0
        build.save_final(place.output_dir / "final", engine, loaded)
        after = held_out.evaluate("after")
        loop.record_evaluation(after.means())
        base = config.model_name_or_path or "random weights"
        end.write_card(place.output_dir / "final", base, to_yaml(config), before, after)
        end.completed(steps=loop.done, engine=engine)
    return 0


def _nothing_to_check(report: StepReport) -> None:
    """Supervised training has no reference to agree with."""


def _load_or_make(config: SftConfig, place: Place, data: ShardedDataset, *, bf16: bool) -> LoadedModel:
    """The named model, or a new one with a tokenizer trained on the data: the same on every rank."""
    if config.model_name_or_path:
        dtype = "bfloat16" if bf16 else "float32"
        loaded = load_model(config.model_name_or_path, dtype=dtype, device=str(place.world.device))
        loaded.model.requires_grad_(True)
        return loaded
    folder = place.output_dir / "start"
    if place.world.is_main and not (folder / "config.json").exists():
        tokenizer = train_tokenizer(_texts(data), vocab_size=config.vocab_size)
        model = new_model(tokenizer, width=config.width, layers=config.layers, heads=config.heads, seed=config.seed)
        tokenizer.save_pretrained(folder)
        model.save_pretrained(folder)
    place.world.wait()
    loaded = load_model(str(folder), device=str(place.world.device))
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
