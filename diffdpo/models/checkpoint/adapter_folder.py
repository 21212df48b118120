"""What a folder that peft wrote says of itself, and of what it was trained on. No torch and no peft is imported to ask.

peft names a base by its folder or hub name, where other weights may lie by now, and any of equal shapes takes the
adapter. So ``base.json`` beside it holds a hash of the base's weights.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from data_pipeline.hub import pinned
from diffdpo.errors import UserError

ADAPTER_CONFIG = "adapter_config.json"
BASE_RECORD = "base.json"
ADAPTER_WEIGHTS = "adapter_model.safetensors"


def is_adapter(name_or_path: str | Path) -> bool:
    """Whether this is the folder of an adapter and not of a model."""
    return (Path(name_or_path) / ADAPTER_CONFIG).is_file()


def check_adapter(folder: str | Path) -> None:
    """UserError for what is no folder with an adapter that can be read."""
    if not is_adapter(folder):
        found = "a folder without one" if Path(folder).is_dir() else "no folder here"
        raise UserError(f"--adapter_name_or_path {folder} is {found}; name a folder that holds {ADAPTER_CONFIG}")
    base_of_adapter(folder)


def uses_dora(folder: str | Path) -> bool:
    """Whether an adapter learns sizes of whole weight rows."""
    return bool(json.loads((Path(folder) / ADAPTER_CONFIG).read_text()).get("use_dora"))


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


def note_base(folder: Path, *, block_size: int | None = None) -> None:
    """Write ``base.json``: which weights the adapter in ``folder`` was trained on, and in blocks of how many tokens
    where that was said beside the base's config."""
    base = base_of_adapter(folder)
    record: dict[str, str | int] = {"base_model_name_or_path": base, "weights_sha256": weights_hash(base)}
    if block_size is not None:
        record["block_size"] = block_size
    (folder / BASE_RECORD).write_text(json.dumps(record, indent=1) + "\n")


def check_base(folder: str | Path, base: str) -> str:
    """'' where ``base`` has the weights that the adapter was trained on; what is not known where nothing was noted.
    UserError where it has others."""
    noted = _noted(folder)
    if not noted:
        return f"{folder} has no {BASE_RECORD}, so nothing tells whether {base} is what the adapter was trained on"
    if weights_hash(base) != noted["weights_sha256"]:
        raise UserError(
            f"{base} has other weights than {noted.get('base_model_name_or_path')}, which the adapter {folder} was "
            f"trained on; name that base with --model_name_or_path, or remove {Path(folder) / BASE_RECORD} to merge "
            "into this one all the same"
        )
    return ""


def block_size_of_adapter(folder: str | Path, asked: int | None) -> int | None:
    """``asked``, or what the adapter was trained with where that was said beside its base's config. UserError for
    another one: the same weights would be another model."""
    noted = _noted(folder).get("block_size")
    if None not in (asked, noted) and asked != noted:
        raise UserError(f"--block_size {asked}: the adapter {folder} was trained with {noted}; leave it out")
    return asked if noted is None else noted


def _noted(folder: str | Path) -> dict[str, Any]:
    """What ``base.json`` says; nothing where there is none."""
    file = Path(folder) / BASE_RECORD
    if not file.is_file():
        return {}
    try:
        noted = dict(json.loads(file.read_text()))
        _ = noted["weights_sha256"], int(noted.get("block_size", 0))
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} cannot be read ({error!r}); restore it, or remove it to go on unchecked") from None
    return noted


def weights_hash(name_or_path: str) -> str:
    """64 hex digits of a checkpoint's safetensors files, by content and in order of their names; read at the disk's
    speed, one thread a file."""
    from data_pipeline.shards import file_sha256  # numpy
    from diffdpo.models.checkpoint.weights import checkpoint_folder, shard_files  # torch

    with ThreadPoolExecutor() as pool:
        digests = list(pool.map(file_sha256, sorted(shard_files(checkpoint_folder(name_or_path)))))
    return hashlib.sha256("\n".join(digests).encode()).hexdigest()
