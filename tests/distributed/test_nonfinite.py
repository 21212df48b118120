"""A step whose gradient is not finite leaves weights and moments as they were, and the next one is taken as if it had
not been: DeepSpeed against the plain engine."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

BIN = Path(sys.executable).parent
ZERO = {
    "ZeRO-1": {"stage": 1},
    "ZeRO-2": {"stage": 2},
    "ZeRO-2, offloaded": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
    "ZeRO-3": {"stage": 3},
}


def steps(processes: int, kind: str, zero: dict, *, bf16: bool = False) -> dict:
    launcher = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(processes)]
    command = [*launcher, "tests/distributed/nonfinite_worker.py", kind, json.dumps(zero), str(int(bf16))]
    env = os.environ | {"PYTHONPATH": os.getcwd(), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("RESULT "))[7:])


@pytest.fixture(scope="module")
def truth() -> dict:
    """The plain engine, on two processes."""
    return steps(2, "plain", {})


@pytest.mark.distributed
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[] if "offloaded" in name else pytest.mark.slow) for name in ZERO]
)
def test_the_step_is_left_out_as_by_the_plain_engine(truth, name):
    found = steps(2, "deepspeed", ZERO[name])
    assert not math.isfinite(found["norms"][1]) and not math.isfinite(truth["norms"][1])
    assert found["weights"][1] == found["weights"][0] != found["weights"][2]
    assert found["weights"][2] == pytest.approx(truth["weights"][2], abs=1e-6)


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("name", ZERO)
def test_the_step_is_left_out_in_bf16(name):
    found = steps(1, "deepspeed", ZERO[name], bf16=True)
    assert not math.isfinite(found["norms"][1])
    assert found["weights"][1] == found["weights"][0] != found["weights"][2]
    assert all(map(math.isfinite, found["weights"][2]))
