"""Where a run is recorded: what can be known wrong before it begins."""

import subprocess
import sys

import pytest

from diffdpo.config import TrainConfig, make_config
from diffdpo.errors import UserError
from diffdpo.settings.tracking import name_and_alias
from diffdpo.tracking.__main__ import main

REFUSED = (
    *("a/b", "a:b", "@x", " @x", ".", "..", "..a", "a" * 257),
    *("m@", "m@ ", "m@latest", "m@Latest", "m@v1", "m@V2", "m@a b", "m@a b!", "m@a@b", "m@a.b", "m@a/b", "m@a\n"),
    "m@" + "a" * 256,
)
TAKEN = ("m", "a b", ".m", "a" * 256, "m@a", "m@a-b_2", "m@v1a", "m@v", "m@Ж", "m@" + "a" * 255)


@pytest.mark.parametrize("text", REFUSED)
def test_a_model_that_mlflow_would_not_take_is_told_at_the_start(text, tmp_path):
    for ask in (
        lambda: make_config(TrainConfig, {"register_model": text}),
        lambda: main([str(tmp_path / "no run"), "--register_model", text]),
    ):
        with pytest.raises(UserError, match="--register_model") as caught:
            ask()
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize("text", TAKEN)
def test_a_model_that_mlflow_takes(text):
    assert make_config(TrainConfig, {"register_model": text}).register_model == text


def test_mlflow_itself_draws_the_same_line():
    from mlflow.exceptions import MlflowException
    from mlflow.utils import validation

    def check(text: str) -> None:
        name, at, alias = text.partition("@")
        validation._validate_model_name(name)
        if at:
            validation._validate_model_alias_name(alias)
            validation._validate_model_alias_name_reserved(alias)

    for text in TAKEN:
        check(text)
    for text in REFUSED:
        if text not in ("a" * 257, "m@a\n"):  # too long for its tables but in sqlite; and a blank that `$` overlooks
            with pytest.raises(MlflowException):
                check(text)


def test_the_alias_has_a_default():
    assert name_and_alias("m") == ("m", "newest") and name_and_alias("m@best") == ("m", "best")


def test_the_check_imports_no_mlflow():
    code = "import sys, diffdpo.settings.tracking as t; t.name_and_alias('m@a'); sys.exit('mlflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60, check=False).returncode == 0
