"""compose.yaml as ``docker compose`` reads it: merged, checked, its ``${NAME:?reason}`` filled in."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from compose_spec import PyCompose

VARIABLE = re.compile(r"\$\{(\w+):\?([^}]+)\}")


def read_compose(path: Path, environment: Mapping[str, str]) -> dict[str, Any]:
    """ValueError for what the compose specification does not know, and for a variable that is missing or empty."""

    def filled(match: re.Match[str]) -> str:
        name, reason = match.groups()
        if not environment.get(name):
            raise ValueError(f"{name}: {reason}")
        return environment[name]

    content = yaml.safe_load(VARIABLE.sub(filled, path.read_text()))
    PyCompose.from_yaml(yaml.safe_dump(content)).validate()
    return content


def read_env(path: Path) -> dict[str, str]:
    """The lines NAME=VALUE of an env file."""
    lines = [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
    return dict(line.split("=", 1) for line in lines)
