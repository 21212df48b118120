"""What a folder that peft wrote says of itself. No torch and no peft here: commands ask before they load either."""

import json
from pathlib import Path

from data_pipeline.hub import pinned
from diffdpo.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(name_or_path: str | Path) -> bool:
    """Whether this is the folder of an adapter and not of a model."""
    return (Path(name_or_path) / ADAPTER_CONFIG).is_file()


def base_of_adapter(folder: str | Path) -> str:
    """The base model an adapter folder names. UserError when it names none or is no LoRA adapter."""
    file = Path(folder) / ADAPTER_CONFIG
    try:
        settings = dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"{file} cannot be read: {error}") from error
    if not settings.get("base_model_name_or_path"):
        raise UserError(f"{file} names no base_model_name_or_path: add the directory or hub id of the base model")
    kind = settings.get("peft_type", "LORA")
    if kind != "LORA":
        raise UserError(f"{file} has peft_type {kind!r}; supported: 'LORA'")
    return str(pinned(str(settings["base_model_name_or_path"]), settings.get("revision")))
