"""Preference training from settings to final model: what ``launch/train.py`` runs."""

from dataclasses import replace

import numpy as np
import torch
from torch import nn

from diffdpo import build
from diffdpo.build import Place
from diffdpo.train.checkpoint import find_checkpoint, read_state
from diffdpo.config import TrainConfig
from diffdpo.engine.base import Engine, count_parameters
from diffdpo.engine.world import shutdown_distributed
from diffdpo.evaluation.heldout import HeldOutPairs, SampledAnswers
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.noise.estimators import check_estimator
from diffdpo.reference.modes import check_reference, choose_mode, make_frozen, make_reference, second_model_share
from diffdpo.reference.precompute import Precomputed, precompute
from diffdpo.scores.reference import Reference
from diffdpo.train.run import Job, carry_out
from diffdpo.step.strategy import MicroBatchShape, check_segmentation, choose_strategy, micro_batch_shape
from diffdpo.scores.segments import Segments
from diffdpo.step.fit import fit_micro_batch, fit_segments
from diffdpo.step.step import LossOptions, PreferenceStep, StepReport

LN2 = float(np.log(2.0))
LN2_TOLERANCE = {False: 1e-6, True: 1e-2}  # fp32, bf16


def train(config: TrainConfig) -> int:
    """Run to the end, whatever the number of processes. Returns the exit code."""
    config = build.resolve(config)  # type: ignore[assignment]
    loss = build.make_loss(config)
    check_segmentation(config.segmentation, couples_pairs=loss.couples_pairs)
    check_reference(config, loss)
    build.make_coefficient(config, loss)
    check_estimator(
        config.score_estimator, num_samples=config.num_mc_samples, num_diffusion_steps=config.num_diffusion_steps
    )
    place = build.find_place(config, "train")
    try:
        build.check_ds_config(config, place.world)
        build.check_names(config)
        if config.precompute_only:
            return _precompute_only(config, loss, place)
        return carry_out(_Training(config, loss, place).job())
    finally:
        shutdown_distributed()


def _precompute_only(config: TrainConfig, loss: LossOptions, place: Place) -> int:
    train_set, eval_set = build.open_data(config, place, build.generated(config))
    build.check_kind_of_records(train_set, loss)
    bf16 = build.resolve_bf16(config, place.world.device)
    place.say(f"reference  {precompute(config, place, train_set, eval_set, bf16=bf16).text}")
    return 0


class _Training:
    """The parts of one run, built in order of the data flow."""

    def __init__(self, config: TrainConfig, loss: LossOptions, place: Place):
        self.config, self.loss, self.place = config, loss, place
        self.coefficient = build.make_coefficient(config, loss)
        self.resume = None
        if config.resume_from_checkpoint:
            self.resume = find_checkpoint(config.resume_from_checkpoint, place.output_dir)
        self.train_set, self.eval_set = build.open_data(config, place, build.generated(config))
        build.check_kind_of_records(self.train_set, loss)
        build.check_batch_size(config, loss, place.world)
        build.check_exact(config, (self.train_set, self.eval_set))
        self.bf16 = build.resolve_bf16(config, place.world.device)
        self.mode, self.why_mode = choose_mode(config, loss, share=lambda: second_model_share(config, place.world))
        self.scores = self._precompute() if self.mode == "precomputed" else None  # before another model is in memory
        self.loaded = self._load_policy()
        self.encoder = build.make_encoder(config, self.loaded.tokenizer, self.loaded.spec)
        self.loader = build.train_loader(config, self.train_set, self.encoder, place.world)
        self.batches = build.eval_batches(config, self.eval_set, self.encoder, place.world)
        self.noise = build.make_noise(config, self.loaded.spec)
        module = build.wrap(config, self.loaded)
        frozen = make_frozen(config, module, bf16=self.bf16) if self.mode == "copy" else None
        self.engine: Engine = build.make_engine(config, module, place, bf16=self.bf16)
        self.segments = build.choose_segments(config, place.world)
        # evaluations keep the shapes that scores made before were made in, whatever --max_memory finds for steps
        eval_segments = build.choose_segments(config, place.world, graph=False)
        self.reference, held_out_reference, self.reference_text = self._make_reference(frozen, eval_segments)
        self.held_out = HeldOutPairs(
            self.engine,
            held_out_reference,
            self.noise,
            loss,
            self.batches,
            SampledAnswers(config, self.engine, self.loaded, self.batches),
            segments=eval_segments,
            max_length=config.max_length,
            limit=config.max_eval_pairs,
        )

    def _precompute(self) -> Precomputed:
        read = read_state(self.resume)["loader"] if self.resume else None
        return precompute(self.config, self.place, self.train_set, self.eval_set, bf16=self.bf16, read=read)

    def _make_reference(self, frozen: nn.Module | None, eval_segments: Segments) -> tuple[Reference, Reference, str]:
        """(of training, of held-out pairs, what it is)."""
        if self.scores is not None:
            return self.scores.train, self.scores.held_out, self.scores.text
        reference, text = make_reference(self.config, self.mode, self.engine, frozen)
        return reference(self.segments), reference(eval_segments), text

    def _load_policy(self) -> LoadedModel:
        config = self.config
        loaded = load_model(
            config.model_name_or_path or str(build.BUNDLED_MODEL),
            dtype="bfloat16" if self.bf16 else "float32",
            device=build.load_device(config, self.place.world),
            load_in_4bit=config.load_in_4bit,
        )
        if not config.use_peft:
            return replace(loaded, model=loaded.model.requires_grad_(True))
        from diffdpo.models.lora.adapters import add_lora

        torch.manual_seed(config.seed)  # the adapter starts the same on every rank
        model = add_lora(
            loaded.model,
            loaded.spec,
            r=config.lora_r,
            alpha=config.lora_alpha,
            target_modules=config.lora_target_modules,
            use_dora=config.use_dora,
            use_rslora=config.use_rslora,
        )
        return replace(loaded, model=model)

    def job(self) -> Job:
        """What is to be carried out."""
        strategy = self._announce()
        config = self.config  # with the micro-batch that was measured
        step = PreferenceStep(
            self.engine,
            self.reference,
            self.noise,
            self.loss,
            strategy=strategy,
            segments=self.segments,
            max_length=config.max_length,
            target_stderr=config.target_stderr,
            coefficient=self.coefficient,
        )
        return Job(
            config=config,
            place=self.place,
            resume=self.resume,
            data=self.train_set,
            loader=self.loader,
            loaded=self.loaded,
            engine=self.engine,
            step=step,
            held_out=self.held_out,
            check_first=self._check_first,
            unit="answers" if self.loss.unpaired else "pairs",
            base=config.model_name_or_path or "diffdpo's bundled arithmetic model",
            stateful_step=step,
        )

    def _shape(self) -> MicroBatchShape:
        return micro_batch_shape(self.config, couples_pairs=self.loss.couples_pairs)

    def _fit(self) -> str:
        """Segments, and micro-batches of the same step, as large as ``--max_memory`` allows; lines of what was done."""
        config, shape, accumulation = self.config, self._shape(), self.config.gradient_accumulation_steps
        free = not shape.couples_pairs and build.micro_batch_is_free(config)
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
            self.config = build.with_micro_batch(config, pairs)
            self.loader = build.train_loader(self.config, self.train_set, self.encoder, self.place.world)
            lines.append(
                f"micro-batches of {pairs}, {self.config.gradient_accumulation_steps} a step, instead of "
                f"{shape.pairs}, {accumulation} a step: the same step, all rows of a micro-batch in one graph"
            )
        return "".join(f"           {line}\n" for line in lines)

    def _announce(self) -> str:
        measured = self._fit() if self.config.max_memory else ""
        config, place = self.config, self.place
        strategy, why = choose_strategy(
            config.segmentation, engine=self.engine, segments=self.segments, shape=self._shape()
        )
        held_out = f"{len(self.eval_set)} held out" if self.eval_set is not None else "none held out"
        total, trained = count_parameters(self.loaded.model)
        place.say(
            f"policy     {config.model_name_or_path or 'the bundled arithmetic model'}, "
            f"{total / 1e6:.2f}M parameters, {trained / 1e6:.2f}M trained, {'bf16' if self.bf16 else 'fp32'}\n"
            f"reference  {self.reference_text} ({self.why_mode})\n"
            f"data       {config.train_data or 'generated arithmetic-reasoning pairs'}: {len(self.train_set)} "
            f"{'records' if self.loss.unpaired else 'pairs'}, "
            f"{held_out}\n"
            f"engine     {self.engine.describe()}, {place.world.size} process(es) on {place.world.device.type}\n"
            f"scores     {config.score_estimator}, n = {self._samples_text()}; loss {self.loss.describe()}, "
            f"beta {config.beta}\n"
            f"memory     segmentation '{strategy}' ({why}), {self.segments.describe()}\n"
            f"{measured}"
            f"output     {place.output_dir}"
        )
        return strategy

    def _samples_text(self) -> str:
        config = self.config
        if config.target_stderr is None:
            return str(config.num_mc_samples)
        return f"up to {config.num_mc_samples} for a standard error of {config.target_stderr} of a reward"

    def _check_first(self, report: StepReport) -> None:
        """With policy = reference and shared noise every preference logit is 0, so the sigmoid loss is ln 2."""
        config = self.config
        if config.ref_model_name_or_path or self.mode == "none" or "sigmoid" not in self.loss.names:
            return
        off = abs(config.beta * report.largest_logit) / 2  # |loss - ln 2| of the worst pair, to first order
        # segments that --max_memory has sized are not those that the scores were made in
        same = self.scores is None or (self.scores.same_shapes and not config.max_memory)
        if not off <= LN2_TOLERANCE[self.bf16] * (1 if same else 10):
            self.place.say(
                f"WARNING: the first step's loss should be ln 2 = {LN2:.6f} (policy = reference, shared noise) but a "
                f"pair is off by {off:.2e}: policy and reference do not compute the same numbers"
            )
        elif set(self.loss.names) <= {"sigmoid", "sft"} and self.loss.weights[0] == 1.0:
            self.place.say(f"step 1: loss {report.loss:.6f}, ln 2 as it must be while policy = reference")
