"""YAML that a person wrote: what stands twice in it is told. PyYAML keeps the last of two equal keys in silence."""

from collections.abc import Mapping
from typing import Any

import yaml

from diffdpo.errors import UserError

MERGE = "tag:yaml.org,2002:merge"


class _SaidOnce(yaml.SafeLoader):
    """Keys are looked at as they stand in the text: what ``<<`` brings may be set again beside it."""

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: dict[tuple[str, str], int] = {}
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode) or key.tag == MERGE:
                continue
            line, before = key.start_mark.line + 1, seen.get((key.tag, key.value))
            if before is not None:
                where = f"in lines {before} and {line}" if before != line else f"in line {line}"
                raise UserError(f"{key.value} stands twice, {where}; take one out")
            seen[key.tag, key.value] = line
        return node


def read_once(text: str) -> Any:
    """What a YAML text holds. UserError where a mapping, at any depth, has a key twice; YAMLError where it is none."""
    return yaml.load(text, _SaidOnce)  # derived from SafeLoader


def by_flag_name(given: Mapping[Any, Any], *, strip: str = "") -> dict[str, Any]:
    """Settings by their names: ``max-steps`` is max_steps; ``strip`` are signs that may stand before a name. UserError
    for one that is there in two spellings."""
    spelled: dict[str, Any] = {}
    for key in given:
        name = str(key).lstrip(strip).replace("-", "_")
        if name in spelled:
            raise UserError(f"{name} stands twice, as {spelled[name]} and {key}; take one out")
        spelled[name] = key
    return {name: given[key] for name, key in spelled.items()}
