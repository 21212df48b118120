"""What a run was made of, on disk: settings as they were resolved and as they were asked for, and what they met.

``config.yaml`` repeats the run (``--config config.yaml --output_dir elsewhere``): nothing in it is left to be chosen.
``asked.yaml`` holds what was not at its default. ``environment.json`` holds versions, commit, command and the facts of
this run (pairs, parameters, why a choice was made).
"""

import json
import platform
import subprocess
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import yaml

from diffdpo import __version__
from diffdpo.config import RunConfig, to_yaml, usual_settings
from diffdpo.engine.world import World
from diffdpo.gpus import is_gpu, kind_of
from diffdpo.settings.base import changed, public
from diffdpo.settings.credentials import hidden, untold
from diffdpo.tracking.commit import git_state
from diffdpo.training.card import FACTS

LONGEST_DIFF = 1_000_000  # characters


def write_record(
    output_dir: Path,
    *,
    resolved: RunConfig,
    asked: RunConfig,
    ds_config: Mapping[str, Any],
    environment: Mapping[str, Any],
) -> None:
    """Write the files; rank 0 only."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "config.yaml").write_text(to_yaml(resolved) + _as_comments(environment))
    (output_dir / "asked.yaml").write_text(settings_text(asked))
    (output_dir / "ds_config.json").write_text(json.dumps(dict(ds_config), indent=1))
    (output_dir / "environment.json").write_text(json.dumps(dict(environment), indent=1))
    write_changes(output_dir)


def _as_comments(environment: Mapping[str, Any]) -> str:
    """The sizes of what a run met, beside its settings: no settings, so nobody reads them back."""
    return "".join(f"# {name}: {environment[name]}\n" for name in FACTS if name in environment)


def write_changes(output_dir: Path) -> None:
    """``changes.diff``: what the code has that its commit has not; nothing where that is nothing."""
    state = git_state()
    (output_dir / "changes.diff").unlink(missing_ok=True)
    if state is None or not state["dirty"]:
        return
    root = Path(__file__).parents[2]
    command = ["git", "-C", str(root), "diff", "HEAD", "--stat", "--patch", "--no-color"]
    with suppress(subprocess.SubprocessError):
        text = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=30, check=True).stdout
        short = text if len(text) <= LONGEST_DIFF else f"{text[:LONGEST_DIFF]}\n(cut: {len(text)} characters)\n"
        (output_dir / "changes.diff").write_text(untold(short))


def settings_text(asked: RunConfig) -> str:
    """What was asked for, as YAML: the settings that are not what the command takes by itself."""
    return yaml.safe_dump(changed(asked, usual_settings(asked)), sort_keys=False)


def environment_of(world: World, command: Sequence[str], facts: Mapping[str, Any]) -> dict[str, Any]:
    """Versions, device and commit of this run, its ``command`` (without what is secret) and its ``facts``."""
    return {
        "diffdpo": __version__,
        "python": platform.python_version(),
        "device": _device_name(world.device),
        "processes": world.size,
        "command": " ".join(command),
        "git": git_state(),
        **facts,
        "packages": packages(),
    }


def packages() -> dict[str, str]:
    """Version of every direct dependency that is installed, extras included."""
    try:
        named = {_name(line) for line in metadata.requires("diffdpo") or ()}
    except metadata.PackageNotFoundError:  # run from a checkout that is not installed
        named = {"torch", "deepspeed", "transformers", "datasets", "accelerate", "webdataset", "mlflow", "peft"}
    found = {}
    for name in sorted(named):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _name(requirement: str) -> str:
    """``torch`` of ``torch<2.15,>=2.11 ; extra == "x"``."""
    for stop in " <>=!~[;":
        requirement = requirement.split(stop)[0]
    return requirement


def _device_name(device: torch.device) -> str:
    return kind_of(device).name(device) if is_gpu(device) else f"cpu ({platform.machine()})"


def parameters_of(config: RunConfig, environment: Mapping[str, Any]) -> dict[str, str]:
    """What MLflow is told as parameters: settings and facts that have a value. Packages, commit and command are in
    ``environment.json``, the DeepSpeed file is an artifact."""
    left_out = ("packages", "git", "command")
    params = {**public(config), **{key: value for key, value in environment.items() if key not in left_out}}
    return {key: str(value) for key, value in params.items() if value is not None}


def data_inputs(config: RunConfig, environment: Mapping[str, Any]) -> list[dict[str, str]]:
    """The run's data: name, what it is for, fingerprint, source and number of records."""
    generated = "generated arithmetic"
    source = hidden(config.train_data or generated)
    count = environment.get("pairs", environment.get("answers", 0))
    found = [("training", source, environment["data_fingerprint"], count)]
    if environment.get("held_out_fingerprint"):
        held_out = hidden(config.eval_data or source)
        found.append(
            ("evaluation", held_out, environment["held_out_fingerprint"], environment.get("held_out_pairs", 0))
        )
    return [
        {
            "name": f"{Path(source.split(',')[0]).name or source}"[:200],
            "context": context,
            "digest": digest,
            "source": source,
            "records": str(records),
        }
        for context, source, digest, records in found
    ]
