"""docs/on_policy.md: its lines and its recipe are what the commands take, and what it tells of is there."""

import re
import shlex

import pytest
import yaml

from diffdpo.cli import iterate as command
from diffdpo.cli.flags import parse_config
from diffdpo.config import PairsConfig, RoundsConfig, TrainConfig, make_config
from diffdpo.onpolicy.rounds import Rounds
from diffdpo.settings.pairs import PAIRINGS
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "on_policy.md").read_text()
LINES = [shlex.split(line) for line in re.findall(r"^    (\S.* launch/\S.*)$", PAGE, re.MULTILINE)]


def flags_of(line: list[str]) -> tuple[str, list[str]]:
    """(script, what follows it)."""
    place = next(n for n, word in enumerate(line) if word.startswith("launch/"))
    return line[place], line[place + 1 :]


@pytest.mark.parametrize("line", LINES, ids=" ".join)
def test_every_line_is_one_that_its_command_takes(line, pairs_file, monkeypatch, tmp_path):
    monkeypatch.chdir(ROOT)
    script, flags = flags_of(line)
    assert (ROOT / script).is_file()
    if script == "launch/iterate.py":
        monkeypatch.setattr("diffdpo.onpolicy.iterate.iterate", lambda rounds, say: None)
        command.main([flags[0], "--output_dir", str(tmp_path / "out")])
        return
    if "--train_data" in flags:
        flags[flags.index("--train_data") + 1] = str(pairs_file)
    assert parse_config(PairsConfig if script == "launch/make_pairs.py" else TrainConfig, flags, "")


def test_the_recipe_is_one(pairs_file):
    written = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    sections = {name: command.section(name, written.pop(name), "page") for name in command.SECTIONS}
    rounds = Rounds(make_config(RoundsConfig, {**written, "output_dir": "out"}), **sections)
    assert make_config(PairsConfig, rounds.pairs_settings(2))
    first = rounds.train_settings(1, tracking_uri="none") | {
        "train_data": str(pairs_file),
        "eval_data": str(pairs_file),
    }
    assert make_config(TrainConfig, first)


def test_every_pairing_is_told_of():
    assert set(PAIRINGS) <= set(re.findall(r"^\| `(\w+)` \|", PAGE, re.MULTILINE))
