"""``README.md`` of a model that is saved: what the hub reads at its head, and what a reader wants to know.

Nothing of the machine it was made on: a path becomes its last part.
"""

import math
import re
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCardData

from data_pipeline.hub import at_revision, split_revision
from diffdpo.config import RunConfig, TrainConfig
from diffdpo.evaluation.result import cell, titles
from diffdpo.models.checkpoint.adapter_folder import base_of_adapter, is_adapter
from diffdpo.settings.base import changed

TAGS = ["diffusion-language-model", "masked-diffusion"]
OF_THIS_MACHINE = {"output_dir", "run_name", "resume_from_checkpoint", "data_cache_dir", "reference_cache"}
OF_THIS_MACHINE |= {"tracking_uri", "experiment_name", "push_to_hub", "hub_model_id", "hub_private_repo", "hub_token"}
LICENCE = ("license", "license_name", "license_link")
CHOSEN = ("engine", "reference", "segmentation", "template")
FACTS = ("dtype", "parameters", "trained_parameters", "pairs", "answers", "held_out_pairs")
Results = Mapping[str, Mapping[str, Any]]


def model_card(
    folder: Path,
    *,
    base: str | None,
    config: RunConfig | None = None,
    made: Mapping[str, Any] | None = None,
    results: Results | None = None,
) -> str:
    """The card of the model, or adapter, in ``folder``.

    ``base``: folder or hub name of what it was made from, None for random weights; ``config``: as it was asked for,
    None for an export; ``made``: what was chosen for the run and what it met (:func:`how_it_was_made`); ``results``:
    held-out metrics before and after.
    """
    data = ModelCardData(
        model_name=folder.absolute().parent.name if results else None,  # of final/, the run's
        base_model=base and _last_part(split_revision(base)[0]),
        **(licence_of(base) if base else {}),
        library_name="peft" if is_adapter(folder) else "transformers",
        datasets=hub_data_sets(config) or None if config else None,
        pipeline_tag="text-generation",
        tags=TAGS + (["diffusion-dpo", "preference-alignment"] if isinstance(config, TrainConfig) else []),
        eval_results=_model_index(results or {}) or None,
    )
    parts = [f"---\n{data.to_yaml()}\n---", "# Masked diffusion language model", _made_from(base, folder)]
    parts += [_table(results)] if results else []
    parts += [HOW_TO_SAMPLE.strip()]
    parts += [_block("How it was made", yaml.safe_dump(dict(made), sort_keys=False))] if made else []
    parts += [_block("Settings that differ from the defaults", shown_settings(config))] if config else []
    return "\n\n".join(parts) + "\n"


def _block(title: str, content: str) -> str:
    return f"## {title}\n\n```yaml\n{content.strip()}\n```"


def how_it_was_made(resolved: RunConfig, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What was chosen for a run, as its ``resolved`` settings have it, and the sizes that it met."""
    chosen = {item.name: getattr(resolved, item.name) for item in fields(resolved) if item.name in CHOSEN}
    return chosen | {name: facts[name] for name in FACTS if name in facts}


HOW_TO_SAMPLE = """
## Sampling

Answers are unmasked step by step and not written from left to right, so `generate` of transformers does not fit:

```
diffdpo generate --model_name_or_path FOLDER_OR_NAME --prompt "..."
```

or in Python `diffdpo.generate(["..."], "FOLDER_OR_NAME")`. Where `config.json` names published code of its family
(`auto_map`), transformers loads it with that (`trust_remote_code=True`).
"""


def _made_from(base: str | None, folder: Path) -> str:
    what = "A LoRA adapter on" if is_adapter(folder) else "Made from"
    return f"{what} {_last_part(base)} by diffdpo." if base else "Made from random weights by diffdpo."


def _table(results: Results) -> str:
    rows = [
        f"| {title} | {cell(key, results[key]['before'])} | {cell(key, results[key]['after'])} |"
        for key, title in titles(results).items()
    ]
    return "\n".join(["| held out, mean ± standard error | before | after |", "|---|---|---|", *rows])


def _model_index(results: Results) -> list[EvalResult]:
    return [
        EvalResult(
            task_type="text-generation",
            dataset_type="held-out",
            dataset_name=f"held out (n = {results[key]['after']['count']})",
            metric_type=key,
            metric_name=title,
            metric_value=round(results[key]["after"]["mean"], 6),
        )
        for key, title in titles(results).items()
        if math.isfinite(results[key]["after"]["mean"])
    ]


def licence_of(base: str) -> dict[str, Any]:
    """What the base's own card says, in its folder or in the hub's cache: ``license``, and its name and address where
    it is no common one; empty where it says nothing."""
    file = _card_of(base_of_adapter(base) if is_adapter(base) else base)
    if file is None:
        return {}
    head = re.match(r"\A---\r?\n(.*?)\r?\n---", file.read_text(errors="replace"), re.DOTALL)
    try:
        found = yaml.safe_load(head[1]) if head else None
    except yaml.YAMLError:
        return {}
    if not isinstance(found, dict) or not isinstance(found.get("license"), str):
        return {}
    return {name: found[name] for name in LICENCE if isinstance(found.get(name), str)}


def _card_of(base: str) -> Path | None:
    from transformers.utils import cached_file

    if Path(base).is_dir():
        return file if (file := Path(base) / "README.md").is_file() else None
    try:
        plain, where = at_revision(base)
        found = cached_file(plain, "README.md", _raise_exceptions_for_missing_entries=False, **where)
    except Exception:  # of many kinds: no network, no right; a card without a licence says no untruth
        return None
    return Path(found) if found else None


def hub_data_sets(config: RunConfig) -> list[str]:
    """The training data that are data sets of the hub, by name."""
    words = [word.strip() for word in (config.train_data or "").split(",")]
    named = [re.match(r"[\w.-]+/[\w.-]+(?=$|[@:#?])", word) for word in words if not Path(word).exists()]
    return [found[0] for found in named if found]


def shown_settings(config: RunConfig) -> str:
    """What was asked for and is not the default, as YAML, without places on this machine."""
    asked = {key: value for key, value in changed(config).items() if key not in OF_THIS_MACHINE}
    shown = {key: _without_folders(value) if isinstance(value, str) else value for key, value in asked.items()}
    return yaml.safe_dump(shown, sort_keys=False).strip()


def _without_folders(value: str) -> str:
    return ",".join(_last_part(word.strip()) for word in value.split(",")) if "/" in value else value


def _last_part(name: str) -> str:
    """A name of the hub as it is; of a path its last part."""
    is_path = name.startswith(("/", "./", "../", "~")) or name.count("/") > 1 or Path(name).exists()
    return Path(name).name if is_path and "://" not in name else name
