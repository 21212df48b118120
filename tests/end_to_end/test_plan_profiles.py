"""docs/4080.md says what the planner says, and its profiles reach their targets."""

import re

import pytest

from benchmarks.plan_profiles import BEGIN, DOC, END, MACHINE, PROFILES, plan, table
from diffdpo.cli.flags import parse_config
from diffdpo.config import TrainConfig
from diffdpo.planner.memory import DEVICE, HOST, MOMENTS, needed
from diffdpo.planner.plan import make_plan
from diffdpo.planner.sizes import gib
from diffdpo.planner.streaming import streamed_layer, ways
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


def test_figures_beside_the_table(monkeypatch):
    """What the text says of the two profiles with all parameters: where checkpoint would not fit, what a layer's
    transfer takes, and where the state may be kept."""
    monkeypatch.chdir(ROOT)
    text, big = DOC.read_text(), {profile.recipe: profile.argv() for profile in PROFILES}
    three, whole = big["full3b.yaml"], big["llada8b_full.yaml"]
    for flags, moment in ((["--segmentation", "checkpoint"], MOMENTS), ([], ("backward",))):
        planned = make_plan(parse_config(TrainConfig, [*three, *flags], ""), MACHINE, timed=False)
        at = [sum(p.bytes for p in planned.parts if p.place == DEVICE and m in p.moments) for m in moment]
        said = f"({gib(max(at)):.1f} GiB planned, which does not fit;" if flags else f"; {gib(max(at)):.1f} in the"
        assert said in text
        assert (max(at) > MACHINE.gpu.memory) == bool(flags)
    planned = make_plan(parse_config(TrainConfig, whole, ""), MACHINE, timed=False)
    layer = streamed_layer(planned.job, planned.numbers, MACHINE.gpu)
    assert f"A layer's {layer.bytes / 2**20:.0f} MiB take {1e3 * layer.transfer:.1f} ms" in text
    assert f"computes {1e3 * layer.row:.1f} ms in it, forward, so from {layer.meet} rows on" in text
    for way in ways(planned.job, planned.numbers, planned.run):
        disk = f"{gib(way.disk):.0f}"
        assert f"| {way.name} | {gib(way.host):.1f} | {disk} | {'**no**' if way.obstacle else 'yes'}" in text


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
