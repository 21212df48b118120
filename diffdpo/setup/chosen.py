"""Settings of a run with what was chosen for the user filled in."""

from typing import Any

from data_pipeline.encode import Encoder
from diffdpo.config import RunConfig
from diffdpo.engine.choice import EngineChoice
from diffdpo.models.bundled import model_or_bundled
from diffdpo.setup.context import RunContext
from diffdpo.shipped import find_shipped
from diffdpo.tracking.run import tracking_uri


def chosen_settings(config: RunConfig, context: RunContext, choice: EngineChoice, encoder: Encoder) -> dict[str, Any]:
    """By name: model, engine, precision, template, run name and where the run is recorded."""
    ds_config = config.ds_config and str(find_shipped("ds_configs", config.ds_config, flag="--ds_config").resolve())
    return {
        "model_name_or_path": model_or_bundled(config.model_name_or_path or config.policy),
        "engine": choice.kind,
        "ds_config": ds_config,
        "bf16": choice.bf16,
        "template": encoder.template,
        "run_name": context.run_name,
        "output_dir": str(context.output_dir),
        "data_cache_dir": str(context.cache_dir),
        "tracking_uri": tracking_uri(config.tracking_uri, context.output_dir) or "none",
    }
