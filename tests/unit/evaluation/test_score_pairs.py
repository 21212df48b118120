"""A score that is no number is told of, not written."""

import json

import pytest
import torch

from data_pipeline.records import PreferenceRecord
from diffdpo.config import ScoreConfig
from diffdpo.errors import UserError
from diffdpo.evaluation.score_pairs import Scorer
from diffdpo.models.load import load_model


@pytest.mark.parametrize("broken", [0, 1])
def test_scores_that_are_not_finite(tiny_model, broken):
    models = [load_model(str(tiny_model)) for _ in range(2)]
    records = [PreferenceRecord(id=name, prompt="1 + 1 =", chosen="2", rejected="3", meta={}) for name in "ab"]
    scorer = Scorer(models, ScoreConfig(num_mc_samples=2, max_length=64, max_prompt_length=32, batch_size=1))
    lines = scorer(iter(records))
    json.dumps(next(lines)[1], allow_nan=False)
    with torch.no_grad():
        next(models[broken].model.parameters()).fill_(float("nan"))
    with pytest.raises(UserError, match=rf"record 'b': the {['model', 'reference'][broken]} gives it no finite score"):
        next(lines)
