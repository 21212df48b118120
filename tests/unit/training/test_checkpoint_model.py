"""The model of a checkpoint is what was trained on what it was trained on."""

from pathlib import Path

import pytest
import torch

from diffdpo.cli import export
from diffdpo.config import TrainConfig
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.errors import UserError
from diffdpo.models.load import load_model
from diffdpo.models.lora.adapters import merge
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.settings.base import public
from diffdpo.setup.model import load_policy
from diffdpo.training.checkpoint import save_checkpoint
from diffdpo.training.checkpoint_model import ALONE, load_checkpoint


def checkpoint_of(config: TrainConfig, out: Path) -> tuple[Path, torch.nn.Module]:
    """(a checkpoint of the plain engine, the model as it was then)."""
    from diffdpo.engine.choice import PLAIN, EngineChoice

    loaded = load_policy(config, EngineChoice(PLAIN, 1), ALONE)
    engine = PlainEngine(MaskedLogProbs(loaded.model, loaded.spec), ALONE, OptimizerOptions(1e-3))
    with torch.no_grad():
        for parameter in engine.parameters:
            parameter += 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3))
    state = {"step": 7, "loader": {}, "before": {}, "config": public(config), "held_by": {}}
    return save_checkpoint(out, 7, engine, state, keep=1), loaded.model


@pytest.mark.parametrize("peft", [False, True])
def test_export_of_a_checkpoint(tiny_model, tmp_path, peft):
    config = TrainConfig(model_name_or_path=str(tiny_model), use_peft=peft, lora_r=2)
    folder, model = checkpoint_of(config, tmp_path / "run")
    export.main(["--checkpoint", str(folder), "--output", str(tmp_path / "out"), "--dtype", "float32"])
    found = load_model(str(tmp_path / "out")).model.state_dict()
    expected = (merge(model) if peft else model).state_dict()
    start = load_model(str(tiny_model)).model.state_dict()
    assert found.keys() == expected.keys() == start.keys()
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert max(float((found[name] - start[name]).abs().max()) for name in start) > 0.01


def test_a_damaged_one_is_refused(tiny_model, tmp_path):
    folder, _ = checkpoint_of(TrainConfig(model_name_or_path=str(tiny_model)), tmp_path / "run")
    file = folder / "weights.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(UserError, match=r"weights\.safetensors"):
        load_checkpoint(str(folder))
    with pytest.raises(UserError, match="no such folder"):
        load_checkpoint(str(tmp_path / "nothing" / "checkpoints" / "step-1"))


def test_it_stands_alone(tmp_path):
    with pytest.raises(UserError, match="leave --adapter"):
        export.main(["--checkpoint", "x", "--adapter", "y", "--output", str(tmp_path / "out")])
