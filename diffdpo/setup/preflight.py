"""All that is looked at before weights are read, in one list: cheap first, data and hub last."""

from data_pipeline.locate import check_rows
from data_pipeline.names import source_names
from data_pipeline.tokenizer import tokenizer_difference
from diffdpo.config import RunConfig, SftConfig, TrainConfig
from diffdpo.engine.choice import EngineChoice
from diffdpo.engine.make import check_host
from diffdpo.engine.preflight import check_recomputed
from diffdpo.errors import UserError
from diffdpo.models.architecture.router import check_router
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.checkpoint.adapter_folder import check_base
from diffdpo.models.load import empty_model, load_tokenizer_and_spec, read_config
from diffdpo.models.lora.targets import target_pattern, whole_modules
from diffdpo.noise.estimators import check_estimator
from diffdpo.reference.modes import check_reference
from diffdpo.setup.accelerate_options import passed_over
from diffdpo.step.strategy import check_deferred, check_segmentation

LARGEST_BETA = 100.0  # of published recipes, 10 (SimPO) is the largest


def check_settings_meet(config: RunConfig) -> None:
    """UserError for settings of different rooms that cannot serve one another; nothing is opened."""
    check_estimator(
        config.score_estimator, num_samples=config.num_mc_samples, num_diffusion_steps=config.num_diffusion_steps
    )
    if isinstance(config, TrainConfig):
        loss = config.loss()
        check_segmentation(config.segmentation, couples_pairs=loss.couples_pairs)
        check_reference(config, loss)


def check_before_weights(config: RunConfig, choice: EngineChoice) -> None:
    """UserError or DataError for what engine, data and models would refuse, as far as it is known without weights."""
    check_host(choice)
    if config.recomputes:
        check_recomputed(choice.ds_config)
    if isinstance(config, TrainConfig):
        check_deferred(config.segmentation, choice.no_sync_obstacle(few=config.adapts))
    check_named(config)


def doubts(config: RunConfig, choice: EngineChoice, *, steps: int) -> list[str]:
    """What is allowed and likely a mistake, a line each, for a run of ``steps`` optimizer steps."""
    found = passed_over(config, choice)
    if config.learning_rate == 0:
        found.append("--learning_rate is 0: nothing is learned")
    if config.warmup_steps > steps:
        found.append(
            f"--warmup_steps {config.warmup_steps} is longer than the run of {steps} steps: the learning rate "
            f"{config.learning_rate:g} is never reached"
        )
    if isinstance(config, TrainConfig) and config.beta > LARGEST_BETA:
        found.append(
            f"--beta {config.beta:g} multiplies log-ratios, which are nats: a loss is saturated as soon as they are "
            "not 0; 0.01 to 10 are usual"
        )
    return found


def check_named(config: RunConfig) -> None:
    """What is wrong with named data at first sight (DataError), and a named model without a config or tokenizer to read
    or without the modules that LoRA is to adapt (UserError), before all the data are prepared."""
    for text in (config.train_data, config.eval_data):
        for source in source_names(text) if text else ():
            check_rows(source, config.columns)
    names = [config.policy]
    if isinstance(config, TrainConfig):
        names.append(config.ref_model_name_or_path)
    for name in filter(None, names):
        load_tokenizer_and_spec(name, block_size=config.block_size)
    if config.adapter_name_or_path and config.model_name_or_path:
        check_base(config.adapter_name_or_path, model_or_bundled(config.policy))
    if isinstance(config, TrainConfig) and config.ref_model_name_or_path:
        _check_read_alike(model_or_bundled(config.policy), config.ref_model_name_or_path, config.block_size)
    if config.train_router:
        if isinstance(config, SftConfig) and not config.policy:
            raise UserError("--train_router: a new model has no router; leave it out")
        family, shape = read_config(model_or_bundled(config.policy), block_size=config.block_size)
        check_router(family.model_class, shape.model_type)
    if isinstance(config, TrainConfig) and (config.lora_target_modules or config.lora_modules_to_save):
        policy = model_or_bundled(config.policy)
        model = empty_model(policy, block_size=config.block_size)
        spec = load_tokenizer_and_spec(policy, block_size=config.block_size)[1]
        whole_modules(model, target_pattern(model, spec, config.lora_target_modules), config.lora_modules_to_save)


def _check_read_alike(policy: str, reference: str, block_size: int | None) -> None:
    """UserError for a reference that reads other tokens: its scores would be those of another text."""
    (one, spec), (other, its) = (load_tokenizer_and_spec(name, block_size=block_size) for name in (policy, reference))
    difference = tokenizer_difference(one, other)
    if not difference and spec.mask_token_id != its.mask_token_id:
        difference = f"the mask is {spec.mask_token_id} here and {its.mask_token_id} there"
    if difference:
        raise UserError(f"--ref_model_name_or_path {reference} has another tokenizer than the policy: {difference}")
