"""Preference training from settings to final model: what ``launch/train.py`` runs."""

from dataclasses import asdict, replace

import numpy as np

from diffdpo import build
from diffdpo.build import Place
from diffdpo.checkpoint import find_checkpoint, read_state
from diffdpo.config import TrainConfig, to_yaml
from diffdpo.engine.base import Engine
from diffdpo.engine.world import leave_world
from diffdpo.evaluation.heldout import HeldOutPairs, SampledAnswers
from diffdpo.loop import Loop
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.noise.estimators import MAX_EXACT_LENGTH, check_estimator, num_rows
from diffdpo.report import Evaluation
from diffdpo.run import finish, resume_parts, start_tracking
from diffdpo.step.backward import choose_strategy
from diffdpo.step.train_step import LossOptions, PreferenceStep, StepReport
from diffdpo.tracking.run import Tracking

LN2 = float(np.log(2.0))
LN2_TOLERANCE = {False: 1e-6, True: 1e-2}  # fp32, bf16


def train(config: TrainConfig) -> int:
    """Run to the end, whatever the number of processes. Returns the exit code."""
    config = build.resolve(config)  # type: ignore[assignment]
    loss = build.make_loss(config)
    check_estimator(
        config.score_estimator, num_samples=config.num_mc_samples, num_diffusion_steps=config.num_diffusion_steps
    )
    place = build.find_place(config, "train")
    try:
        return _Training(config, loss, place).run()
    finally:
        leave_world()


class _Training:
    """The parts of one run, built in order; ``run`` puts them to work."""

    def __init__(self, config: TrainConfig, loss: LossOptions, place: Place):
        self.config, self.loss, self.place = config, loss, place
        self.resume = None
        if config.resume_from_checkpoint:
            self.resume = find_checkpoint(config.resume_from_checkpoint, place.output_dir)
        self.train_set, self.eval_set = build.open_data(config, place, build.generated(config))
        build.check_kind_of_records(self.train_set, loss)
        self.bf16 = build.resolve_bf16(config, place.world.device)
        self.loaded = self._load_policy()
        self.encoder = build.make_encoder(config, self.loaded.tokenizer, self.loaded.spec)
        self.loader = build.train_loader(config, self.train_set, self.encoder, place.world)
        self.batches = build.eval_batches(config, self.eval_set, self.encoder, place.world)
        self.noise = build.make_noise(config, self.loaded.spec)
        self.segment_rows = build.choose_segment_rows(config, place.world.device)
        module = build.wrap(config, self.loaded)
        frozen = build.make_frozen(config, loss, module, bf16=self.bf16)
        self.engine: Engine = build.make_engine(config, module, place, bf16=self.bf16)
        self.reference, self.reference_text = build.make_reference(
            config, self.engine, loss, frozen, segment_rows=self.segment_rows
        )
        self.held_out = HeldOutPairs(
            self.engine,
            self.reference,
            self.noise,
            self.batches,
            SampledAnswers(config, self.engine, self.loaded, self.batches),
            beta=config.beta,
            segment_rows=self.segment_rows,
            limit=config.max_eval_pairs,
        )

    def _load_policy(self) -> LoadedModel:
        config = self.config
        loaded = load_model(
            config.model_name_or_path or str(build.BUNDLED_MODEL),
            dtype="bfloat16" if self.bf16 else "float32",
            device=str(self.place.world.device),
            load_in_4bit=config.load_in_4bit,
        )
        if not config.use_peft:
            return replace(loaded, model=loaded.model.requires_grad_(True))
        from diffdpo.models.adapters import add_lora

        targets = config.lora_target_modules
        model = add_lora(loaded.model, loaded.spec, r=config.lora_r, alpha=config.lora_alpha, target_modules=targets)
        return replace(loaded, model=model)

    def run(self) -> int:
        """Before, train, after; the record of it and the final model."""
        config, place, world = self.config, self.place, self.place.world
        strategy = self._announce()
        step = PreferenceStep(
            self.engine, self.reference, self.noise, self.loss, strategy=strategy, segment_rows=self.segment_rows
        )
        state = read_state(self.resume) if self.resume else {}
        if self.resume:  # before anything of the run's record is touched: a refusal must leave it as it was
            resume_parts(config, place, self.resume, self.engine, self.loader)
        extra = {"data_fingerprint": self.train_set.fingerprint}
        tracking = start_tracking(config, place, resume_step=state.get("step"), extra=extra)
        with finish(place, tracking) as end:
            before = Evaluation(state["before"]) if self.resume else self.held_out.evaluate("before")
            loop = self._loop(step, before, tracking, done=state.get("step", 0))
            if not self.resume:
                loop.record_evaluation(before.means())
            complete = loop.run()
            if not complete:
                end.stopped(loop.done)
                return 0
            folder = place.output_dir / "final"
            build.save_final(folder, self.engine, self.loaded)
            after = self.held_out.evaluate("after")
            loop.record_evaluation(after.means())
            base = config.model_name_or_path or "diffdpo's bundled arithmetic model"
            end.write_card(folder, base, to_yaml(config), before, after)
            end.completed(steps=loop.done, engine=self.engine)
        world.wait()
        return 0

    def _announce(self) -> str:
        config, place = self.config, self.place
        per_answer = num_rows(config.score_estimator, length=MAX_EXACT_LENGTH, num_samples=config.num_mc_samples)
        rows = 2 * per_answer * config.per_device_train_batch_size
        strategy, why = choose_strategy(
            config.segmentation,
            rows=rows,
            segment_rows=self.segment_rows,
            keeps_gradients_sharded=self.engine.keeps_gradients_sharded,
            whole_batch=self.loss.whole_batch,
        )
        held_out = f"{len(self.eval_set)} held out" if self.eval_set is not None else "none held out"
        total = sum(p.numel() for p in self.loaded.model.parameters())
        trainable = sum(p.numel() for p in self.loaded.model.parameters() if p.requires_grad)
        place.say(
            f"policy     {config.model_name_or_path or 'the bundled arithmetic model'}, "
            f"{total / 1e6:.2f}M parameters, {trainable / 1e6:.2f}M trained, {'bf16' if self.bf16 else 'fp32'}\n"
            f"reference  {self.reference_text}\n"
            f"data       {config.train_data or 'generated arithmetic-reasoning pairs'}: {len(self.train_set)} pairs, "
            f"{held_out}\n"
            f"engine     {self.engine.describe()}, {place.world.size} process(es) on {place.world.device.type}\n"
            f"scores     {config.score_estimator}, n = {config.num_mc_samples}; loss {', '.join(self.loss.names)}, "
            f"beta {config.beta}\n"
            f"memory     segmentation '{strategy}' ({why}), {self.segment_rows} rows a segment\n"
            f"output     {place.output_dir}"
        )
        return strategy

    def _loop(self, step: PreferenceStep, before: Evaluation, tracking: Tracking | None, *, done: int) -> Loop:
        return Loop(
            config=self.config,
            output_dir=self.place.output_dir,
            engine=self.engine,
            loader=self.loader,
            step=step,
            total_steps=build.total_steps(self.config, self.loader),
            journal=tracking.journal if tracking else None,
            evaluate=self.held_out.quick,
            check_first=self._check_first,
            state={"before": dict(before.values), "config": asdict(self.config)},
            done=done,
        )

    def _check_first(self, report: StepReport) -> None:
        """With policy = reference and shared noise every preference logit is 0, so the sigmoid loss is ln 2."""
        config = self.config
        if config.ref_model_name_or_path or "sigmoid" not in self.loss.names:
            return
        off = abs(config.beta * report.largest_logit) / 2  # |loss - ln 2| of the worst pair, to first order
        if off > LN2_TOLERANCE[self.bf16]:
            self.place.say(
                f"WARNING: the first step's loss should be ln 2 = {LN2:.6f} (policy = reference, shared noise) but a "
                f"pair is off by {off:.2e}: policy and reference do not compute the same numbers"
            )
        elif set(self.loss.names) <= {"sigmoid", "sft"} and self.loss.weights[0] == 1.0:
            self.place.say(f"step 1: loss {report.loss:.6f}, ln 2 as it must be while policy = reference")
