"""Rounds of on-policy preference training: sample answers, judge and pair them, train on the pairs, evaluate, again.

    python launch/iterate.py recipes/on_policy_arithmetic.yaml --output_dir rounds

The recipe is YAML: settings of the rounds (below), and under make_pairs: and train: settings of those two commands.
Flags override the recipe's own settings. Killed at any moment and run again it goes on; with a larger --rounds too.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from diffdpo.cli.flags import build_parser, own_settings, read_yaml
from diffdpo.config import PairsConfig, RoundsConfig, TrainConfig, bundled_settings, make_config, resolve
from diffdpo.errors import UserError

SECTIONS = {"make_pairs": PairsConfig, "train": TrainConfig}


def main(argv: list[str]) -> None:
    """Run the rounds that are not done."""
    named = argv[0] if argv and not argv[0].startswith("-") else None
    flags = vars(build_parser(RoundsConfig, __doc__ or "").parse_args(argv[1:] if named else argv))
    recipe = flags.pop("config", None) or named
    flags.pop("local_rank", None)
    given = read_yaml(Path(recipe), what="the recipe", example="rounds: 4") if recipe else {}
    sections = {name: section(name, given.pop(name, None), recipe) for name in SECTIONS}
    where = f"{recipe}: "
    own = own_settings(RoundsConfig, given, where=where) | own_settings(RoundsConfig, flags)
    config = make_config(RoundsConfig, own)
    if not (config.model_name_or_path or config.adapter_name_or_path):
        sections["train"] = bundled() | sections["train"]
    from diffdpo.onpolicy.iterate import iterate
    from diffdpo.onpolicy.judging import judge_named
    from diffdpo.onpolicy.make import check_sampler
    from diffdpo.onpolicy.rounds import Rounds
    from diffdpo.setup.preflight import check_settings_meet

    rounds = Rounds(config, sections["make_pairs"], sections["train"])
    pairs = make_config(PairsConfig, rounds.pairs_settings(1))  # wrong values end here, and not after a round
    judge_named(pairs.verifier)
    check_sampler(pairs)
    first = rounds.train_settings(1, tracking_uri="none")
    if "eval_data" in rounds.train:
        first["train_data"] = first["eval_data"]  # in the place of pairs that are not made yet
    else:
        first = {name: value for name, value in first.items() if name not in ("train_data", "eval_data")}
    check_settings_meet(cast(TrainConfig, resolve(make_config(TrainConfig, first))))
    iterate(rounds, say=lambda text: print(text, flush=True))


def section(name: str, given: Any, recipe: str | None) -> dict[str, Any]:
    """Settings of a command. UserError for a name it has not, a value of another type, and what is no mapping."""
    if given is None:
        return {}
    if not isinstance(given, Mapping):
        raise UserError(f"{recipe}: {name} is {given!r}; write the command's settings below it, indented")
    settings = {str(key).replace("-", "_"): value for key, value in given.items()}
    return own_settings(SECTIONS[name], settings, where=f"{recipe}: {name}: ")


def bundled() -> dict[str, Any]:
    """What suits the bundled model, where it is what is trained."""
    settings = bundled_settings()
    settings.pop("num_generated_pairs", None)
    return settings
