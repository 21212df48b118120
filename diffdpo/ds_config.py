"""The DeepSpeed JSON of ``--ds_config``, read and checked. No torch in here."""

import json
from pathlib import Path
from typing import Any

from diffdpo.errors import UserError


def read_ds_config(path: Path) -> dict[str, Any]:
    """The DeepSpeed JSON of ``--ds_config``."""
    try:
        content = json.loads(path.read_text())
    except FileNotFoundError:
        shipped = ", ".join(sorted(str(p) for p in Path("ds_configs").glob("*.json"))) or "none in ./ds_configs"
        raise UserError(f"--ds_config {path}: no such file; shipped: {shipped}") from None
    except (json.JSONDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise UserError(f"--ds_config {path} is not JSON: {error}") from None
    if not isinstance(content, dict):
        raise UserError(f"--ds_config {path} must hold a JSON object, found {type(content).__name__}")
    zero, optimizer = "zero_optimization", "optimizer"
    for keys in (
        *((zero,), (optimizer,), ("bf16",), ("fp16",), (optimizer, "params")),
        *((zero, "offload_optimizer"), (zero, "offload_param")),
    ):
        found: Any = content
        for key in keys:
            found = found.get(key, {})
        if not isinstance(found, dict):
            raise UserError(f"--ds_config {path}: {'.'.join(keys)} must be an object, found {found!r}")
    if content.get("scheduler"):
        raise UserError(
            f"--ds_config {path} sets a scheduler; the rate is set by --lr_scheduler_type and --warmup_steps, so leave "
            "it out of the JSON"
        )
    stage = content.get("zero_optimization", {}).get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise UserError(f"--ds_config {path}: zero_optimization.stage is {stage!r}; allowed: 0, 1, 2, 3")
    return content
