"""A run that is finished is left as it is, by what its summary says; a summary that says nothing is no traceback."""

import json
from types import SimpleNamespace

import pytest

from diffdpo.config import TrainConfig
from diffdpo.errors import UserError
from diffdpo.training.resume import asked_of, finished_summary

CONFIG = TrainConfig(resume_from_checkpoint="auto", max_steps=6)


@pytest.fixture
def finished(tmp_path):
    """A run's folder with its model, and what is said."""
    (tmp_path / "final").mkdir()
    said: list[str] = []
    return SimpleNamespace(output_dir=tmp_path, print=said.append, said=said)


def test_a_finished_run_is_not_begun_again(finished):
    (finished.output_dir / "summary.json").write_text(json.dumps({"steps": 6, "asked": asked_of(CONFIG)}))
    assert finished_summary(CONFIG, finished)["steps"] == 6 and "is finished: 6 steps" in finished.said[0]


@pytest.mark.parametrize("text", ["", '{"steps": 6', "[]", "6", "{}"])
def test_a_damaged_summary_is_told(finished, text):
    (finished.output_dir / "summary.json").write_text(text)
    with pytest.raises(UserError, match=r"summary.json is damaged .*no checkpoint to go on from"):
        finished_summary(CONFIG, finished)
    (finished.output_dir / "checkpoints" / "step-4").mkdir(parents=True)
    assert finished_summary(CONFIG, finished) is None
    assert "going on from the newest checkpoint" in finished.said[0]
