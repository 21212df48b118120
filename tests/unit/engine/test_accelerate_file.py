"""What accelerate was configured for and what the flags say."""

import pytest
import yaml

from diffdpo.engine.accelerate_file import check_accelerate
from diffdpo.errors import UserError
from tests.support.paths import ROOT


@pytest.mark.parametrize(
    ("variable", "kind"), [("ACCELERATE_USE_FSDP", "fsdp2"), ("ACCELERATE_USE_DEEPSPEED", "deepspeed")]
)
def test_another_engine_is_refused(variable, kind):
    check_accelerate(kind, {variable: "true"})
    check_accelerate("plain", {variable: "false"})
    check_accelerate("plain", {})
    for other in {"plain", "fsdp2", "deepspeed"} - {kind}:
        with pytest.raises(UserError, match="--"):
            check_accelerate(other, {variable: "true"})


@pytest.mark.parametrize("kind", ["fsdp", "deepspeed"])
def test_the_files_are_what_their_names_say(kind):
    file = yaml.safe_load((ROOT / f"launch/accelerate/{kind}.yaml").read_text())
    assert file["distributed_type"] == kind.upper()
    assert (file["num_machines"], file["machine_rank"], file["rdzv_backend"]) == (2, 0, "static")
