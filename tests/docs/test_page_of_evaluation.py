"""docs/evaluation.md: every command runs, in the page's order, in one folder."""

import json
import re
import shlex
import subprocess

import pytest

from diffdpo.cli import main as diffdpo
from tests.support.paths import ROOT

PAGE = (ROOT / "docs" / "evaluation.md").read_text()


def commands() -> list[str]:
    blocks = re.findall(r"^```bash\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def test_every_command_of_the_page_runs(tmp_path, monkeypatch, python):
    pytest.importorskip("lm_eval")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    assert len(commands()) >= 12
    for line in commands():
        if line.startswith("diffdpo "):  # in this process: starting it anew for each would take a minute
            code = diffdpo.main(shlex.split(line)[1:])
            assert not code, line
        else:
            subprocess.run(["bash", "-euc", line.replace("python ", f"{python} ")], check=True, timeout=100)
    assert json.loads((tmp_path / "bundled.json").read_text())["results"][0]["items"] == 24
    assert [each["task"] for each in json.loads((tmp_path / "tasks.json").read_text())["results"]][
        1
    ] == "judge.py:brief"
    (results,) = (tmp_path / "harness").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["results"]["worked"]["acc,none"] >= 0 and found["config"]["loglikelihoods_estimated"] == 24
