"""``diffdpo iterate``: rounds of sample, pair and train, each in its folder, that go on wherever they were interrupted.

A stage is a command in a process of its own, and each of them goes on by itself; what a round came to is written last.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
import yaml

from data_pipeline.files import write_whole
from data_pipeline.generate import generate_pairs
from diffdpo.engine.world import World
from diffdpo.errors import Stopped, UserError
from diffdpo.onpolicy.answers import as_json_lines
from diffdpo.onpolicy.average import write_average
from diffdpo.onpolicy.parent_run import ParentRun
from diffdpo.onpolicy.questions import Question
from diffdpo.onpolicy.rounds import Rounds, as_row, deal
from diffdpo.onpolicy.stage import run_stage
from diffdpo.settings.base import public
from diffdpo.settings.pairs import PairingSettings
from diffdpo.setup.data import GENERATED_EVAL_PAIRS, GENERATED_EVAL_SEED
from diffdpo.tracking.lock import one_run_in
from diffdpo.tracking.run import tracking_uri

RECIPE, ROUND, SUMMARY = "recipe.json", "round.json", "summary.json"
PAIRING = tuple(item.name for item in fields(PairingSettings))  # decided anew from answers that are there
MORE_LATER = ("rounds", "launcher", "tracking_uri", "experiment_name")  # may change between two calls


def iterate(rounds: Rounds, *, say: Callable[[str], None] = print) -> list[dict[str, Any]]:
    """What each round came to. UserError, TrainingError or Stopped where a stage ended so."""
    dealt, asked = deal(rounds.config)
    if asked.repeated or asked.unusable:
        again = f" ({asked.contradicted} with another right result)" if asked.contradicted else ""
        say(f"prompts  left out {asked.repeated} met before{again}, {asked.unusable} that cannot be used")
    uri = tracking_uri(rounds.config.tracking_uri, rounds.folder)
    with one_run_in(rounds.folder, World(0, 0, 1, torch.device("cpu"))):
        _begin(rounds, asked.digest if rounds.config.prompts else None, say)
        parent = ParentRun(rounds.folder, uri, rounds.config.experiment_name, public(rounds.config))
        done, status = [], "FAILED"
        try:
            for number, questions in enumerate(dealt, start=1):
                done.append(_round(rounds, number, questions, uri, parent, say))
                say(_table(done))
            write_whole(rounds.folder / SUMMARY, (json.dumps(done, indent=1) + "\n").encode())
            status = "FINISHED"
        except (Stopped, KeyboardInterrupt):
            status = "KILLED"
            raise
        finally:
            parent.close(status)
    say(f"final    {rounds.final(len(dealt))}")
    return done


def _begin(rounds: Rounds, prompts_digest: str | None, say: Callable[[str], None]) -> None:
    """Note the recipe, and the held-out problems of generated prompts. UserError where another recipe was begun; how
    answers are judged and paired may change from round to round, which is told."""
    judged = {name: rounds.make_pairs[name] for name in PAIRING if name in rounds.make_pairs}
    sampled = {name: value for name, value in rounds.make_pairs.items() if name not in PAIRING}
    config = {"make_pairs": sampled, "pairing": judged, "train": dict(rounds.train)} | public(rounds.config)
    config["prompts_digest"] = prompts_digest
    now = json.loads(json.dumps(config, default=str))
    file = rounds.folder / RECIPE
    if file.exists():
        was = json.loads(file.read_text())
        was.setdefault("prompts_digest", now["prompts_digest"])  # of folders begun before it was noted
        if "pairing" not in was:
            was["pairing"] = {name: was["make_pairs"].pop(name) for name in PAIRING if name in was["make_pairs"]}
        dealt_by_rounds = rounds.config.prompts and not rounds.config.prompts_per_round
        free = {*MORE_LATER, "output_dir", "pairing"} - ({"rounds"} if dealt_by_rounds else set())
        if was["prompts_digest"] != now["prompts_digest"]:
            raise UserError(
                f"prompts {rounds.config.prompts} are not those that {rounds.folder} was begun with, so a round could "
                "ask what an earlier one has asked; give the file as it was, or another folder"
            )
        if was["pairing"] != now["pairing"]:
            say(f"NOTE  earlier rounds were paired with {was['pairing']}, those to come with {now['pairing']}")
        for name in sorted(was.keys() | now.keys()):
            if was.get(name) != now.get(name) and name not in free:
                raise UserError(
                    f"output_dir {rounds.folder} was begun with {name} {was.get(name)}, not {now.get(name)}; give "
                    "another folder, or the recipe of that one"
                )
    elif any(path.name != "run.lock" and path.suffix != ".partial" for path in rounds.folder.iterdir()):
        raise UserError(f"output_dir {rounds.folder} holds other files; give another folder")
    write_whole(file, (json.dumps(now, indent=1) + "\n").encode())
    held_out = rounds.folder / "held_out.jsonl"
    if not rounds.config.prompts and not rounds.train.get("eval_data") and not held_out.exists():
        pairs = list(generate_pairs(GENERATED_EVAL_PAIRS, seed=GENERATED_EVAL_SEED, split="eval"))
        write_whole(held_out, as_json_lines(pairs))


def _round(
    rounds: Rounds,
    number: int,
    questions: list[Question],
    uri: str | None,
    parent: ParentRun,
    say: Callable[[str], None],
) -> dict[str, Any]:
    """One round, or what it came to if it is done."""
    folder = rounds.of(number)
    if (folder / ROUND).exists():
        return json.loads((folder / ROUND).read_text())
    folder.mkdir(exist_ok=True)
    say(f"\nround {number}: {len(questions)} prompts to {' on '.join(reversed(list(rounds.policy(number).values())))}")
    write_whole(folder / "prompts.jsonl", as_json_lines([as_row(question) for question in questions]))
    stages = {
        "make-pairs": rounds.pairs_settings(number),
        "train": rounds.train_settings(number, tracking_uri=uri or "none", parent=parent.run_id),
    }
    for command, settings in stages.items():
        recipe = folder / f"{command}.yaml"
        write_whole(recipe, yaml.safe_dump(settings, sort_keys=False).encode())
        name = f"round {number}, {command}"
        run_stage(name, [command, "--config", str(recipe)], launcher=rounds.config.launcher)
    if rounds.config.round_reference == "average" and not rounds.average(number).exists():
        so_far = str(rounds.average(number - 1)) if number > 1 else rounds.policy(1)["model_name_or_path"]
        write_average(so_far, rounds.final(number), rounds.average(number), decay=rounds.config.average_decay)
    found = {"round": number, **_came_to(folder)}
    write_whole(folder / ROUND, (json.dumps(found, indent=1) + "\n").encode())
    parent.round_done(number, _numbers(found))
    return found


def _came_to(folder: Path) -> dict[str, Any]:
    """Counts of the pairs, and held-out metrics before and after."""
    pairs = json.loads((folder / "pairs" / "summary.json").read_text())["counts"]
    trained = json.loads((folder / "train" / "summary.json").read_text())
    return {"pairs": pairs, "steps": trained["steps"], "held_out": trained.get("held_out", {})}


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    answers = max(1, found["pairs"]["answers"])
    own = {"pairs": found["pairs"]["pairs"], "sampled_right": found["pairs"]["right"] / answers}
    return own | {f"held_out/{name}": value["after"]["mean"] for name, value in found["held_out"].items()}


SHOWN = {"exact_match": "exact match", "rewards/accuracies": "preference accuracy"}


def _table(done: list[dict[str, Any]]) -> str:
    """A line a round: pairs, share of right answers among those sampled, and the held-out metrics after it."""
    lines = ["round  pairs  sampled right  " + "  ".join(f"{title:>20}" for title in SHOWN.values())]
    for found in done:
        own = _numbers(found)
        cells = [_cell(found["held_out"].get(name)) for name in SHOWN]
        lines.append(
            f"{found['round']:>5}  {own['pairs']:>5.0f}  {own['sampled_right']:>13.1%}  "
            + "  ".join(f"{cell:>20}" for cell in cells)
        )
    return "\n".join(lines)


def _cell(measured: Mapping[str, Any] | None) -> str:
    if not measured:
        return "-"
    before, after = measured["before"], measured["after"]
    return f"{before['mean']:.1%} > {after['mean']:.1%} ± {after['stderr']:.1%}"
