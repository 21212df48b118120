"""A model, or an adapter, with its tokenizer in a folder that others can read: other programs, and other people."""

import json
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from diffdpo.models.checkpoint.adapter_folder import ADAPTER_CONFIG
from diffdpo.models.checkpoint.tokenizer_files import save_tokenizer

AUTO_CLASSES = ("AutoModel", "AutoModelForMaskedLM", "AutoModelForCausalLM")


def write_model(model: Any, tokenizer: Any, folder: Path, **options: Any) -> None:
    """Config, safetensors and tokenizer. ``options``: those of transformers' ``save_pretrained``."""
    if len(getattr(model, "peft_config", ())) > 1:  # the adapter as it started stands beside the trained one
        options = {"selected_adapters": ["default"], **options}
    with _without_bars():
        model.save_pretrained(folder, **options)
    save_tokenizer(tokenizer, folder)
    if (folder / ADAPTER_CONFIG).is_file():
        _name_no_class_of_ours(folder / ADAPTER_CONFIG, model)
    _let_others_read(folder)


@contextmanager
def _without_bars() -> Iterator[None]:
    """transformers draws one over the files it writes; downloads keep theirs."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def _name_no_class_of_ours(file: Path, model: Any) -> None:
    """peft notes the class of the base, which only we have; AutoPeftModel would import it. transformers' own Auto class
    that the base's config leads from finds the published one."""
    settings = json.loads(file.read_text())
    if not settings.get("auto_mapping"):
        return
    own = getattr(model.config, "auto_map", None) or {}
    name = next((name for name in AUTO_CLASSES if name in own), AUTO_CLASSES[0])
    settings["auto_mapping"] = {"base_model_class": name, "parent_library": "transformers"}
    file.write_text(json.dumps(settings, indent=2, sort_keys=True))


def _let_others_read(folder: Path) -> None:
    """safetensors writes for the owner alone. The umask cannot be asked for in a process with threads; what an ordinary
    file was given tells it."""
    neighbour = next(folder / name for name in (ADAPTER_CONFIG, "config.json") if (folder / name).is_file())
    for file in folder.glob("*.safetensors"):
        file.chmod(stat.S_IMODE(neighbour.stat().st_mode))
