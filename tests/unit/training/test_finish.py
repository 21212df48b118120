"""What a user is told at the end of a run that did not come to its end."""

from pathlib import Path
from types import SimpleNamespace

import pytest

from diffdpo.config import TrainConfig
from diffdpo.training.finish import Finish


@pytest.fixture
def told(tmp_path: Path):
    """A run's end with one checkpoint there, and what it says."""
    (tmp_path / "checkpoints/step-4").mkdir(parents=True)
    said: list[str] = []
    context = SimpleNamespace(print=said.append, output_dir=tmp_path)
    return Finish(context, None, None, TrainConfig()), said  # type: ignore[arg-type]


@pytest.mark.parametrize("stopped", [True, False])
def test_a_run_is_gone_on_with_where_its_state_comes_back(told, stopped):
    end, said = told
    end.stopped(4) if stopped else end.interrupted()
    assert "--resume_from_checkpoint latest" in said[-1]
    end.resumable = False  # as on NVMe
    end.stopped(4) if stopped else end.interrupted()
    assert "cannot be gone on with" in said[-1] and "--resume_from_checkpoint" not in said[-1]
