"""Held-out figures of two and three processes are those of one."""

import json
import sys
from pathlib import Path

import pytest
import torch

from data_pipeline.generate import generate_pairs
from diffdpo.engine.world import World
from tests.support.held_out import figures

TORCHRUN = str(Path(sys.executable).parent / "torchrun")
CASES = [(1, 5), (16, 5), (2, 0)]
EXACT = ("problems", "length", "exact_match")


@pytest.mark.distributed
@pytest.mark.parametrize("processes", [pytest.param(2, marks=pytest.mark.slow), 3])
def test_figures_do_not_depend_on_the_processes(command, tiny_model, tmp_path, processes):
    records = list(generate_pairs(13, seed=5))
    single = [{"completion": r["chosen"], "label": True} if i % 2 else {} for i, r in enumerate(records)]
    keys = ("id", "prompt", "chosen", "rejected")
    mixed = [
        {k: r[k] for k in keys[: 2 if more else 4]} | more | ({"label": i % 4 == 1} if more else {})
        for i, (r, more) in enumerate(zip(records, single, strict=True))
    ]
    files = []
    for name, some in (("pairs", records), ("unpaired", mixed)):
        files.append(str(tmp_path / f"{name}.jsonl"))
        Path(files[-1]).write_text("".join(json.dumps(record) + "\n" for record in some))
    out = tmp_path / "found.json"
    worker = ["tests/support/held_out.py", str(tiny_model), *files, json.dumps(CASES), str(out)]
    start = [TORCHRUN, "--standalone", "--nproc_per_node", str(processes)]
    done = command([*start, *worker], timeout=300, PYTHONPATH=str(Path.cwd()))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    alone = World(rank=0, local_rank=0, size=1, device=torch.device("cpu"))
    for (batch, limit), found in zip(CASES, json.loads(out.read_text()), strict=True):
        expected = figures(str(tiny_model), *files, batch=3, limit=limit, world=alone, cache=tmp_path)
        assert found.keys() == expected.keys()
        for kind, values in expected.items():
            assert found[kind].keys() == values.keys(), kind
            for name, items in values.items():
                close = items if name in EXACT else pytest.approx(items, abs=2e-5)
                assert found[kind][name] == close, (batch, limit, kind, name)
