"""Supervised training with the masked-diffusion loss: what ``launch/sft.py`` runs.

The loss of an answer is -score / tokens, with the same rows and weights (L/k for ``mask_count``) as preference scores:
response tokens only, the terminator among them, the prompt never masked (Nie et al., LLaDA, arXiv 2502.09992, eq. 5).
"""

import shutil
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any, cast

from data_pipeline.addresses import hidden
from data_pipeline.batch import Fault
from data_pipeline.dataset import ShardedDataset
from data_pipeline.facts import count_kinds, refuse_unusable
from data_pipeline.records import AnswerRecord
from data_pipeline.stages import RecordReader
from diffdpo.config import SftConfig, resolve
from diffdpo.engine.base import count_parameters
from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.make import choice_for, load_device, make_engine, weight_shards
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.evaluation.heldout import HeldOutAnswers
from diffdpo.evaluation.heldout_tasks import HeldOutTasks
from diffdpo.losses.options import LossOptions
from diffdpo.models.architecture.block_attention import check_flex
from diffdpo.models.architecture.from_scratch import new_model, train_tokenizer
from diffdpo.models.architecture.published_config import context_of
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import LoadedModel, dtype_name, load_model, load_tokenizer_and_spec, save_model
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import no_reference
from diffdpo.scores.segments import make_segments
from diffdpo.settings.engine import accumulation_passed_over, over_processes
from diffdpo.setup import data as run_data
from diffdpo.setup.chosen import chosen_settings
from diffdpo.setup.context import RunContext
from diffdpo.setup.model import describe_model, load_policy, reading_of
from diffdpo.setup.preflight import check_before_weights, check_settings_meet, doubts
from diffdpo.step.report import StepReport
from diffdpo.step.step import PreferenceStep
from diffdpo.step.strategy import choose_strategy, micro_batch_shape
from diffdpo.training.answer_canvas import fill_canvas
from diffdpo.training.callbacks import Callback
from diffdpo.training.guard import Watch, guarded
from diffdpo.training.loop import StepFunction
from diffdpo.training.resume import checkpoint_of
from diffdpo.training.run import Result, Run, carry_out, finished_before

CONTEXT = 1024  # of a new model, unless its rows are longer
SUPERVISED = LossOptions(("sft",), (1.0,), beta=1.0)
TOKENIZER_RECORDS = 20_000  # the tokenizer of a new model is trained on the first of the data


def sft(config: SftConfig, *, callbacks: Sequence[Callback] = ()) -> Result:
    """Run to the end, whatever the number of processes. UserError or DataError for what a user can mend."""
    asked, config = config, cast(SftConfig, resolve(config))
    check_settings_meet(config)
    return guarded(
        config,
        "sft",
        lambda context, watch: _sft(config, asked, context, watch, callbacks),
        stopped=Result.of_a_stop,
    )


def _sft(
    config: SftConfig, asked: SftConfig, context: RunContext, watch: Watch, callbacks: Sequence[Callback]
) -> Result:
    config = over_processes(config, context.world.size)
    for line in accumulation_passed_over(asked, config):
        context.print(f"warning  {line}")
    choice = choice_for(config, context.world)
    check_before_weights(config, choice)
    if (finished := finished_before(config, context)) is not None:
        return finished
    return carry_out(replace(_build(config, context, choice, watch, callbacks), asked=asked))


def _check_attention(config: SftConfig, world: World) -> None:
    """UserError where FlexAttention cannot be, before a model is read or made."""
    if config.flex and config.policy:
        spec = load_tokenizer_and_spec(config.policy, block_size=config.block_size)[1]
        check_flex(world.device, block_size=spec.block_size)
    elif config.flex:
        check_flex(world.device, block_size=config.block_size)


def _build(
    config: SftConfig, context: RunContext, choice: EngineChoice, watch: Watch, callbacks: Sequence[Callback]
) -> Run:
    world = context.world
    _check_attention(config, world)
    resume = checkpoint_of(config, context)
    train_set, eval_set = run_data.open_data(config, context, run_data.generated(config, context.world))
    answers = _answers_of(train_set)
    loaded = _load_or_make(config, context, choice, train_set, keep=resume is not None)
    encoder = make_encoder(config, loaded.tokenizer, loaded.spec)
    longest = context_of(loaded.model.config)
    run_data.warn_of_data(config, context, (train_set, eval_set), longest=longest)
    refuse_unusable(train_set, encoder)
    loader = run_data.train_loader(config, train_set, encoder, world)
    for doubt in doubts(config, choice, steps=run_data.total_steps(config, loader)):
        context.print(f"warning  {doubt}")
    batches = run_data.eval_batches(config, eval_set, encoder, world)
    noise = NoiseOptions.of(config, loaded.spec)
    module = MaskedLogProbs.of(loaded.model, loaded.spec, config)
    engine = make_engine(choice, module, world, OptimizerOptions.of(config), say=context.print)
    meets = world if engine.retry_obstacle() is not None else None
    segments = make_segments(config, choice, world.device, world=meets, in_training=True)
    strategy, why = choose_strategy(
        config.segmentation,
        obstacle=engine.no_sync_obstacle(),
        reduces_in_backward=choice.reduces_in_backward,
        segments=segments,
        shape=micro_batch_shape(config, couples_pairs=False, block_size=loaded.spec.block_size),
    )
    eval_segments = make_segments(config, choice, world.device, world=world)
    records = run_data.held_out_records(eval_set, batches, world)
    tasks = HeldOutTasks(config, engine, loaded, encoder, records=records, batches=batches, segments=eval_segments)
    held_out = HeldOutAnswers(engine, noise, batches, tasks, segments=eval_segments)
    context.print(_announcement(config, context, choice, loaded, answers, f"'{strategy}' ({why})"))
    for sentence in tasks.fewer():
        context.print(f"tasks    {sentence}")
    step = PreferenceStep(engine, no_reference, noise, SUPERVISED, strategy=strategy, segments=segments, compared=False)
    named = {"model_name_or_path": config.model_name_or_path or config.policy}  # None: a new one
    chosen = chosen_settings(config, context, choice, encoder) | named
    return Run(
        config=replace(config, **chosen, segmentation=strategy, eval_task=held_out.tasks.task),
        asked=config,
        facts=_facts(loaded, choice, (train_set, eval_set), why=why),
        context=context,
        watch=watch,
        resume=resume,
        data=train_set,
        loader=loader,
        loaded=loaded,
        engine=engine,
        step=_with_canvas(step, config, loaded) if config.answer_canvas else step,
        held_out=held_out,
        check_first=_nothing_to_check,
        unit="answers",
        base=config.policy,
        callbacks=callbacks,
    )


def _with_canvas(step: PreferenceStep, config: SftConfig, loaded: LoadedModel) -> StepFunction:
    """The step on micro-batches whose answers are filled up with terminators (``answer_canvas``)."""
    canvas = {"canvas": config.answer_canvas, "terminator_id": loaded.spec.terminator_id, "seed": config.seed}
    return lambda micro_batches, rate: step([fill_canvas(batch, **canvas) for batch in micro_batches], rate)


def _facts(
    loaded: LoadedModel, choice: EngineChoice, data: tuple[ShardedDataset, ShardedDataset | None], *, why: str
) -> dict[str, Any]:
    total, trained = count_parameters(loaded.model)
    answers, held_out = data
    return {
        "parameters": total,
        "trained_parameters": trained,
        "answers": len(answers),
        "held_out_pairs": len(held_out) if held_out is not None else 0,
        "held_out_fingerprint": held_out.fingerprint if held_out is not None else None,
        "dtype": dtype_name(choice.bf16),
        "why_segmentation": why,
    }


def _announcement(
    config: SftConfig, context: RunContext, choice: EngineChoice, loaded: LoadedModel, answers: str, strategy: str
) -> str:
    model = describe_model(config) if config.policy else "new"
    return (
        f"model    {model}, {count_parameters(loaded.model)[0]:,} parameters\n"
        f"data     {hidden(config.train_data or '') or 'generated arithmetic-reasoning answers'}: {answers}\n"
        f"engine   {choice.describe()}; segmentation {strategy}\n"
        f"output   {context.output_dir}"
    )


def _answers_of(data: ShardedDataset) -> str:
    """What of the data is trained on, in words. UserError where there is nothing."""
    kinds = count_kinds(data)
    if not kinds.pairs + kinds.desirable:
        raise UserError(
            f"--train_data: all {kinds.undesirable} answers are undesirable (label false), and supervised training "
            "learns from right ones; give others, or launch/train.py --loss_type kto"
        )
    chosen = f"{kinds.pairs} of them the chosen ones of pairs" if kinds.pairs else ""
    left_out = f"{kinds.undesirable} undesirable ones (label false) are not trained on" if kinds.undesirable else ""
    return f"{kinds.pairs + kinds.desirable} answers" + "".join(f", {part}" for part in (chosen, left_out) if part)


def _nothing_to_check(report: StepReport) -> None:
    """Supervised training has no reference to agree with."""


def _load_or_make(
    config: SftConfig, context: RunContext, choice: EngineChoice, data: ShardedDataset, *, keep: bool
) -> LoadedModel:
    """The named model, or a new one with a tokenizer trained on the data: the same on every rank. ``keep``: the one
    that is there, of the run that is resumed."""
    device, shards = load_device(choice, context.world), weight_shards(choice, context.world)
    if config.policy:
        context.print(reading_of(config))
        return load_policy(config, choice, context.world)
    folder = context.output_dir / "start"
    if context.world.is_main and not (keep and folder.exists()):
        shutil.rmtree(folder, ignore_errors=True)  # of a start that was broken off, perhaps with other settings
        tokenizer = train_tokenizer(_texts(data), vocab_size=config.vocab_size)
        sizes = {"width": config.width, "layers": config.layers, "heads": config.heads}
        context_length = max(CONTEXT, config.max_length)
        sizes |= {"max_length": context_length, "block_size": config.block_size or 0}
        model = new_model(tokenizer, **sizes, seed=config.seed)
        partial = folder.with_name("start.partial")  # renamed when whole: an interrupted one is never taken for it
        save_model(model, tokenizer, partial)
        partial.rename(folder)
    context.world.barrier()
    loaded = load_model(str(folder), device=device, shards=shards)
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
