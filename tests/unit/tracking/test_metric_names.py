"""Names of metrics that MLflow takes."""

import pytest

from diffdpo.tracking.metric_names import mlflow_name

NAMES = [
    "eval/exact_match/number@held.jsonl",
    "eval/exact_match/number@/data/a b/held (1).jsonl",
    r"eval/exact_match/regex:answer is (\d+)",
    "eval/exact_match/regex:answer is (\\d*)",
    "eval/exact_match/judge.py:brief@../up//held.jsonl",
    "eval/exact_match/regex:" + "x" * 400,
    "eval/multiple_choice@prüfung.jsonl",
]


@pytest.mark.parametrize("name", NAMES)
def test_mlflow_takes_it(name):
    from mlflow.utils.validation import _validate_metric_name

    _validate_metric_name(mlflow_name(name))


def test_what_it_takes_stays_and_others_stay_apart():
    for name in ("loss", "eval/rewards/margins", "time/data", "eval/exact_match/gsm8k"):
        assert mlflow_name(name) == name
    assert mlflow_name("eval/exact_match/number@held.jsonl") == "eval/exact_match/number_held.jsonl"
    assert len({mlflow_name(name) for name in NAMES}) == len(NAMES)
