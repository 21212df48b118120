"""docs/4080.md says what the planner says, and its profiles reach their targets."""

import re

import pytest

from benchmarks.plan_profiles import BEGIN, DOC, END, MACHINE, PROFILES, plan, table
from diffdpo.cli.flags import parse_config
from diffdpo.config import TrainConfig
from diffdpo.planner.memory import DEVICE, HOST, needed
from diffdpo.planner.plan import make_plan
from diffdpo.planner.sizes import gib
from tests.support.paths import ROOT

TABLE = DOC.read_text().partition(BEGIN)[2].partition(END)[0]


BLOCKS = ("sdar8b.json", "llada2mini.json")
LONG = [
    pytest.param(
        each, marks=pytest.mark.slow if each.shape in ("sdar8b.json", "llada2mini.json") else (), id=each.recipe
    )
    for each in PROFILES
]
"""Thousands of experts, or three forwards a trace, take their time on the meta device too."""


@pytest.mark.parametrize("profile", LONG)
def test_memory_as_the_document_says_and_within_the_target(profile, monkeypatch):
    monkeypatch.chdir(ROOT)
    planned = make_plan(parse_config(TrainConfig, profile.argv(), ""), MACHINE, timed=False)
    cells = next(line for line in TABLE.splitlines() if line.startswith(f"| {profile.title} |")).split(" | ")
    gpu, moment = needed(planned.parts, DEVICE)
    assert cells[1] == f"{gib(gpu):.1f} ({moment})" and cells[3] == f"{gib(planned.need(HOST)):.1f}", (
        "run python benchmarks/plan_profiles.py"
    )
    if profile.most:
        assert gib(gpu) <= profile.most


@pytest.mark.slow
def test_the_whole_table(monkeypatch):
    monkeypatch.chdir(ROOT)
    assert table([plan(profile) for profile in PROFILES]) == TABLE


@pytest.mark.parametrize("profile", PROFILES, ids=lambda profile: profile.recipe)
def test_recipes_and_the_commands_in_them(profile, monkeypatch):
    monkeypatch.chdir(ROOT)
    config = parse_config(TrainConfig, profile.argv(), "")
    assert config.num_mc_samples in (4, 8) and config.max_length == 1024 and config.bf16
    text = (ROOT / "recipes" / profile.recipe).read_text()
    assert f"--ds_config ds_configs/{profile.ds_config} --config recipes/{profile.recipe}" in text
    assert all(
        (ROOT / name).exists() for name in re.findall(r"\b(?:recipes|ds_configs|docs)/[\w./]+\.(?:yaml|json|md)", text)
    )
