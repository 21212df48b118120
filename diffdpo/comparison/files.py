"""The small files of a run's record, in whatever state they are: what cannot be read is told and stops nothing."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from diffdpo.evaluation import item_file


def read_mapping(path: Path, gaps: list[str], *, needed: bool = True, instead: str = "") -> dict[str, Any]:
    """The content of a JSON or YAML file; {} where it is absent or damaged, which ``gaps`` is told, and what stands
    ``instead`` of it. Of a file that is not ``needed`` only damage is told."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else yaml.safe_load(text)
    except FileNotFoundError:
        if needed:
            gaps.append(f"{path.name} is missing{instead}")
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        content = None
    if isinstance(content, dict):
        return content
    gaps.append(f"{path.name} is damaged or cannot be read{instead}")
    return {}


def read_items(folder: Path, gaps: list[str]) -> dict[str, Any]:
    """What ``held_out.json`` of a run holds that can be used; {} where there is none."""
    instead = "; no difference item by item can be taken"
    return item_file.usable(read_mapping(folder / item_file.FILE, gaps, needed=False, instead=instead), gaps)


def number_in(content: Mapping[str, Any], name: str, file: str, gaps: list[str]) -> float | None:
    """A number of a file's content; None where there is none, which ``gaps`` is told of where something else stands
    in its place."""
    value = content.get(name)
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return value
    if value is not None:
        gaps.append(f"{name} of {file} is no number")
    return None
