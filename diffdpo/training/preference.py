"""Preference training from settings to final model: what ``launch/train.py`` runs."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, cast

import numpy as np
from torch import nn

from data_pipeline.addresses import hidden
from data_pipeline.facts import refuse_unusable
from diffdpo.config import TrainConfig, resolve
from diffdpo.engine.base import Engine, FrozenModule, count_parameters, trains_few
from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.make import choice_for, make_engine
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.evaluation.heldout import HeldOutPairs
from diffdpo.evaluation.heldout_tasks import HeldOutTasks
from diffdpo.losses.options import LossOptions
from diffdpo.models.architecture.block_attention import check_flex
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.encoder import make_encoder
from diffdpo.models.load import dtype_name, load_tokenizer_and_spec, model_context
from diffdpo.noise.options import NoiseOptions
from diffdpo.reference.modes import choose_mode, make_frozen, make_reference, second_model_share
from diffdpo.reference.precompute import Precomputed, ReferencePass
from diffdpo.reference.refresh import RefreshingStep
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.reference import Reference
from diffdpo.scores.rounding import RELATIVE
from diffdpo.scores.segments import Segments, make_segments
from diffdpo.settings.engine import accumulation_passed_over, over_processes
from diffdpo.setup import data as run_data
from diffdpo.setup.chosen import chosen_settings
from diffdpo.setup.context import RunContext
from diffdpo.setup.model import describe_model, load_policy, reading_of
from diffdpo.setup.preflight import check_before_weights, check_settings_meet, doubts
from diffdpo.step.fit import fit_micro_batch, fit_segments
from diffdpo.step.report import StepReport
from diffdpo.step.step import PreferenceStep
from diffdpo.step.strategy import MicroBatchShape, choose_strategy, micro_batch_shape, with_micro_batch
from diffdpo.training.callbacks import Callback
from diffdpo.training.checkpoint import read_state
from diffdpo.training.guard import Watch, guarded
from diffdpo.training.resume import checkpoint_of
from diffdpo.training.run import Result, Run, carry_out, finished_before

LN2 = float(np.log(2.0))


def train(config: TrainConfig, *, callbacks: Sequence[Callback] = ()) -> Result:
    """Run to the end, whatever the number of processes. UserError or DataError for what a user can mend."""
    asked, config = config, cast(TrainConfig, resolve(config))
    check_settings_meet(config)
    return guarded(
        config,
        "train",
        lambda context, watch: _train(config, asked, context, watch, callbacks),
        stopped=Result.of_a_stop,
    )


def _train(
    config: TrainConfig, asked: TrainConfig, context: RunContext, watch: Watch, callbacks: Sequence[Callback]
) -> Result:
    config = over_processes(config, context.world.size)
    for line in accumulation_passed_over(asked, config):
        context.print(f"warning    {line}")
    choice = choice_for(config, context.world, adapter=config.adapts)
    check_before_weights(config, choice)
    if (finished := finished_before(config, context)) is not None:
        return finished
    parts = _Data(config, context, choice)
    if config.precompute_only:
        context.print(f"reference  {parts.precompute().text}")
        return Result.of_precomputation(context.output_dir)
    return carry_out(_Training(parts).run(asked, callbacks, watch))


class _Data:
    """What a run reads, before any weights: data, their encoding and the streams."""

    def __init__(self, config: TrainConfig, context: RunContext, choice: EngineChoice):
        self.config, self.context, self.choice, self.loss = config, context, choice, config.loss()
        world = context.world
        self.resume = checkpoint_of(config, context)
        self.train_set, self.eval_set = run_data.open_data(config, context, run_data.generated(config, context.world))
        run_data.check_kind_of_records(self.train_set, self.loss)
        run_data.check_batch_size(config, self.loss, world)
        policy = model_or_bundled(config.policy)
        tokenizer, self.spec = load_tokenizer_and_spec(policy, block_size=config.block_size)
        if config.flex:
            check_flex(world.device, block_size=self.spec.block_size)
        self.encoder = make_encoder(config, tokenizer, self.spec)
        longest = model_context(policy, block_size=config.block_size)
        run_data.warn_of_data(config, context, (self.train_set, self.eval_set), self.loss, longest)
        refuse_unusable(self.train_set, self.encoder)
        if not self.spec.block_size:  # of blocks the masks of each block are enumerated
            run_data.check_exact(config, self.encoder, (self.train_set, self.eval_set))
        self.loader = run_data.train_loader(config, self.train_set, self.encoder, world)
        for doubt in doubts(config, choice, steps=run_data.total_steps(config, self.loader)):
            context.print(f"warning    {doubt}")

    def precompute(self) -> Precomputed:
        """All reference scores that the run still needs."""
        config, world = self.config, self.context.world
        work = ReferencePass(
            config,
            self.choice,
            world,
            encoder=self.encoder,
            spec=self.spec,
            cache_dir=self.context.cache_dir,
            say=self.context.print,
        )
        loader = run_data.train_loader(config, self.train_set, self.encoder, world)
        if self.resume:
            loader.load_state_dict(read_state(self.resume)["loader"])
        streams = [work.training(loader, last=run_data.total_steps(config, loader))]
        if self.eval_set is not None:
            held_out = run_data.eval_loader(config, self.eval_set, self.encoder, world)
            streams.append(work.held_out(held_out))
        return work.complete(streams)


class _Training:
    """The parts of one run with weights in them, built in order of the data flow."""

    def __init__(self, parts: _Data):
        self.parts, self.context, self.choice = parts, parts.context, parts.choice
        self.config, self.loss, self.loader = parts.config, parts.loss, parts.loader
        config, choice, world = self.config, self.choice, self.context.world
        self.mode, self.why_mode = choose_mode(
            config, self.loss, share=lambda: second_model_share(config, choice, world)
        )
        # before another model is in memory
        self.scores = parts.precompute() if self.mode == "precomputed" else None
        self.context.print(reading_of(config))
        self.loaded = load_policy(config, choice, world, with_start=self.mode == "adapter_start")
        self.noise = NoiseOptions.of(config, self.loaded.spec, ld_alpha=config.ld_alpha)
        module = MaskedLogProbs.of(self.loaded.model, self.loaded.spec, config)
        frozen = make_frozen(config, module, choice, world) if self.mode == "copy" else None
        options = OptimizerOptions.of(config)
        self.engine: Engine = make_engine(choice, module, world, options, say=self.context.print)
        meets = world if self.engine.retry_obstacle() is not None else None
        self.segments = make_segments(config, choice, world.device, world=meets, in_training=True)
        self.frozen = frozen  # the reference's module, where there is a second one
        self.held_out = self._held_out(frozen)

    def _held_out(self, frozen: nn.Module | None) -> HeldOutPairs:
        """The references, and what evaluations measure under them."""
        config, parts, world = self.config, self.parts, self.context.world
        held = self.engine.freeze(frozen) if frozen is not None else None
        if config.sync_ref_model:
            assert isinstance(self.engine, PlainEngine) and frozen is not None
            self.engine.beside["reference"] = frozen
        # evaluations keep the shapes that scores made before were made in, whatever --max_memory finds for steps
        segments = make_segments(config, self.choice, world.device, world=world)
        self.reference, held_out_reference, self.reference_text = self._references(held, segments)
        batches = run_data.eval_batches(config, parts.eval_set, parts.encoder, world)
        return HeldOutPairs(
            self.engine,
            held_out_reference,
            self.noise,
            self.loss,
            batches,
            HeldOutTasks(
                config,
                self.engine,
                self.loaded,
                parts.encoder,
                records=run_data.held_out_records(parts.eval_set, batches, world),
                batches=batches,
                segments=segments,
            ),
            segments=segments,
            max_length=config.max_length,
            moves=config.sync_ref_model,
        )

    def _references(self, frozen: FrozenModule | None, eval_segments: Segments) -> tuple[Reference, Reference, str]:
        """(of training, of held-out pairs, what it is)."""
        if self.scores is not None:
            return self.scores.train, self.scores.held_out, self.scores.text
        reference, text = make_reference(self.config, self.mode, self.engine, frozen)
        return reference(self.segments), reference(eval_segments), text

    def run(self, asked: TrainConfig, callbacks: Sequence[Callback], watch: Watch) -> Run:
        """What is to be carried out."""
        measured = self._fit() if self.config.max_memory else ""
        config = self.config  # with the micro-batch that was measured
        strategy, why = choose_strategy(
            config.segmentation,
            obstacle=self.engine.no_sync_obstacle(),
            reduces_in_backward=self.choice.reduces_in_backward,
            segments=self.segments,
            shape=self._shape(),
            few=trains_few(self.engine.module),
        )
        self.context.print(self._announcement(strategy, why, measured))
        for sentence in self.held_out.tasks.fewer():
            self.context.print(f"tasks      {sentence}")
        step = PreferenceStep(
            self.engine,
            self.reference,
            self.noise,
            self.loss,
            strategy=strategy,
            segments=self.segments,
            compared=self.mode != "none",
            max_length=config.max_length,
            reference_forwards=int(self.mode not in ("precomputed", "none")),
        )
        return Run(
            config=self._resolved(strategy),
            asked=asked,
            facts=self._facts(why),
            context=self.context,
            watch=watch,
            resume=self.parts.resume,
            data=self.parts.train_set,
            loader=self.loader,
            loaded=self.loaded,
            engine=self.engine,
            step=self._refreshing(step) if config.sync_ref_model else step,
            held_out=self.held_out,
            check_first=self._check_first,
            unit="answers" if self.loss.unpaired else "pairs",
            step_is_of_records=not (self.loss.couples_pairs or self.loss.needs_reference_point),
            base=model_or_bundled(config.policy),
            callbacks=callbacks,
            reference=self.frozen,
        )

    def _refreshing(self, step: PreferenceStep) -> RefreshingStep:
        """The step with a reference that follows the policy (``--sync_ref_model``)."""
        assert isinstance(self.engine, PlainEngine)
        alpha, every = self.config.ref_model_mixup_alpha, self.config.ref_model_sync_steps
        moving = self.engine.beside["reference"]
        return RefreshingStep(step, moving, alpha=alpha, every=every, steps_per_epoch=len(self.loader))

    def _resolved(self, strategy: str) -> TrainConfig:
        """The settings with all that was chosen, so that they repeat the run."""
        chosen = chosen_settings(self.config, self.context, self.choice, self.parts.encoder)
        return replace(
            self.config,
            **chosen,
            reference=self.mode,
            segmentation=strategy,
            score_estimator=self.noise.estimator,
            eval_task=self.held_out.tasks.task,
        )

    def _facts(self, why: str) -> dict[str, Any]:
        total, trained = count_parameters(self.loaded.model)
        return {
            "parameters": total,
            "trained_parameters": trained,
            "pairs": len(self.parts.train_set),
            "held_out_pairs": len(self.parts.eval_set) if self.parts.eval_set is not None else 0,
            "held_out_fingerprint": self.parts.eval_set.fingerprint if self.parts.eval_set is not None else None,
            "dtype": dtype_name(self.choice.bf16),
            "reference_model": self.reference_text,
            "why_reference": self.why_mode,
            "why_segmentation": why,
        }

    def _shape(self) -> MicroBatchShape:
        block_size = self.loaded.spec.block_size
        return micro_batch_shape(self.config, couples_pairs=self.loss.couples_pairs, block_size=block_size)

    def _fit(self) -> str:
        """Segments, and micro-batches of the same step, as large as ``--max_memory`` allows; lines of what was done."""
        config, shape, accumulation = self.config, self._shape(), self.config.gradient_accumulation_steps
        # ``deferred`` goes by the answer, and a JSON may fix how a step is cut
        free = not shape.couples_pairs and config.segmentation != "deferred" and not self.choice.fixes_batch_sizes
        fit = fit_segments(
            self.engine,
            self.segments,
            shape,
            fraction=config.max_memory,
            accumulation=accumulation if free else 1,
        )
        lines = [fit.describe(shape.max_length)]
        pairs = fit_micro_batch(fit, shape, accumulation) if free else shape.pairs
        if pairs != shape.pairs:
            self.config = with_micro_batch(config, pairs)
            self.loader = run_data.train_loader(
                self.config, self.parts.train_set, self.parts.encoder, self.context.world
            )
            lines.append(
                f"micro-batches of {pairs}, {self.config.gradient_accumulation_steps} a step, instead of "
                f"{shape.pairs}, {accumulation} a step: the same step, all rows of a micro-batch in one graph"
            )
        return "".join(f"           {line}\n" for line in lines)

    def _announcement(self, strategy: str, why: str, measured: str) -> str:
        config, context, parts = self.config, self.context, self.parts
        held_out = f"{len(parts.eval_set)} held out" if parts.eval_set is not None else "none held out"
        total, trained = count_parameters(self.loaded.model)
        return (
            f"policy     {describe_model(config)}, "
            f"{total / 1e6:.2f}M parameters, {trained / 1e6:.2f}M trained, {'bf16' if self.choice.bf16 else 'fp32'}\n"
            f"reference  {self.reference_text} ({self.why_mode})\n"
            f"data       {hidden(config.train_data or '') or 'generated arithmetic-reasoning pairs'}: "
            f"{len(parts.train_set)} {'records' if self.loss.unpaired else 'pairs'}, "
            f"{held_out}\n"
            f"engine     {self.choice.describe()}, {context.world.size} process(es) on {context.world.device.type}\n"
            f"scores     {self.noise.describe(config.score_estimator)}; loss {self.loss.describe()}, "
            f"beta {config.beta}\n"
            f"memory     segmentation '{strategy}' ({why}), {self.segments.describe()}\n"
            f"{measured}"
            f"output     {context.output_dir}"
        )

    def _check_first(self, report: StepReport) -> None:
        """With policy = reference and shared noise every preference logit is 0, so the sigmoid loss is ln 2."""
        config, loss = self.config, self.loss
        apart = self.mode == "adapter_off" and config.adapter_name_or_path  # the policy starts with an adapter
        if config.ref_model_name_or_path or apart or self.mode == "none" or "sigmoid" not in loss.names:
            return
        if not report.records or not math.isfinite(report.loss):
            return  # told of by the loop: there is no loss to compare
        if not report.relative_logit <= RELATIVE[self.choice.bf16]:
            self.context.print(
                f"WARNING: the first step's loss should be ln 2 = {LN2:.6f} (policy = reference, shared noise) but the "
                f"log-ratios of a pair differ by {report.largest_logit:.2e} nats, {report.relative_logit:.1e} of its "
                "scores, more than rounding makes: policy and reference do not compute the same numbers"
            )
        elif _is_plain_sigmoid(loss):
            off = f" (log-ratios of up to {report.largest_logit:.1e} nats: rounding)" if report.largest_logit else ""
            self.context.print(f"step 1: loss {report.loss:.6f}, ln 2 as it must be while policy = reference{off}")


def _is_plain_sigmoid(loss: LossOptions) -> bool:
    return set(loss.names) <= {"sigmoid", "sft"} and loss.weights[0] == 1.0
