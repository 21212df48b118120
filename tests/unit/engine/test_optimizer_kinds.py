"""Optimizers of ``--optim``: what they keep, that they go on to the bit, and where they are refused."""

import pytest
import torch

from diffdpo.config import TrainConfig, make_config
from diffdpo.engine.optimizer import OptimizerOptions, state_bytes
from diffdpo.engine.optimizer_kinds import make_optimizer, state_tensors
from diffdpo.engine.plain import PlainEngine
from diffdpo.errors import UserError
from diffdpo.settings.engine import OPTIMIZERS
from tests.support.steps import WORLD

KINDS = [name for name in OPTIMIZERS if name not in ("paged_adamw_8bit", "adamw_torch_fused")]


class Small(torch.nn.Module):
    """An embedding, a matrix large enough for 8 bits, a small one and a vector."""

    def __init__(self, seed: int = 0):
        super().__init__()
        torch.manual_seed(seed)
        self.embed, self.large, self.small = torch.nn.Embedding(40, 64), torch.nn.Linear(64, 96), torch.nn.Linear(96, 8)

    def forward(self, ids):
        return self.small(self.large(self.embed(ids)).tanh())


def engine_of(name: str, seed: int = 0) -> PlainEngine:
    return PlainEngine(Small(seed), WORLD, OptimizerOptions(1e-2, weight_decay=0.1, name=name))


def steps(engine: PlainEngine, first: int, last: int) -> list[float]:
    found = []
    for number in range(first, last):
        ids = torch.randint(0, 40, (16,), generator=torch.Generator().manual_seed(number))
        loss = (engine(ids) - 1).square().mean()
        engine.backward(loss, last=True)
        engine.step(1e-2)
        found.append(float(loss))
    return found


@pytest.fixture(params=KINDS)
def kind(request):
    if request.param == "adamw_8bit":
        pytest.importorskip("bitsandbytes")
    return request.param


def test_it_learns_and_goes_on_to_the_bit(kind, tmp_path):
    whole = engine_of(kind)
    before = steps(whole, 0, 12)
    whole.save(tmp_path)
    after = steps(whole, 12, 20)
    assert after[-1] < 0.8 * before[0]
    resumed = engine_of(kind, seed=1)
    resumed.load(tmp_path)
    assert steps(resumed, 12, 20) == after
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters, resumed.parameters, strict=True))


@pytest.mark.parametrize("name", ["adamw_torch", "adafactor"])
def test_a_weight_that_starts_at_0_is_moved_by_the_rate(name):
    """As LoRA's second factor does: an update that is relative to a weight's size would leave it there."""
    engine = engine_of(name)
    weight = engine.module.large.weight
    weight.data.zero_()
    steps(engine, 0, 1)
    assert float(weight.detach().square().mean().sqrt()) > 0.1 * 1e-2


def test_the_planner_counts_what_it_keeps(kind):
    engine = engine_of(kind)
    steps(engine, 0, 1)
    module, kept, planned = engine.module, 0, 0
    for parameter in engine.parameters:
        tensors = state_tensors(engine.optimizer, parameter)
        kept += sum(value.nbytes for name, value in tensors.items() if name != "step")
        planned += state_bytes(kind, parameter.shape, in_block=parameter is not module.embed.weight)
    assert kept == planned


def test_a_checkpoint_of_another_is_refused(tmp_path):
    for wrote, reads in (("adafactor", "muon"), ("adafactor", "adamw_torch"), ("adamw_torch", "muon")):
        folder = tmp_path / f"{wrote}-{reads}"
        folder.mkdir()
        writer = engine_of(wrote)
        steps(writer, 0, 1)
        writer.save(folder)
        with pytest.raises(UserError, match="another --optim"):
            engine_of(reads).load(folder)


def test_muon_takes_matrices_of_blocks_only():
    engine = engine_of("muon")
    steps(engine, 0, 1)
    states = {name: set(state_tensors(engine.optimizer, p)) for name, p in engine.module.named_parameters()}
    assert {name for name, kept in states.items() if kept == {"momentum_buffer"}} == {"large.weight", "small.weight"}
    assert states["embed.weight"] == {"step", "exp_avg", "exp_avg_sq"}


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ({"optim": "muon", "engine": "fsdp2"}, "FSDP2 steps on shards"),
        ({"optim": "adamw_8bit", "ds_config": "zero2"}, "DeepSpeed steps on shards"),
        ({"optim": "lion"}, "adafactor"),
    ],
)
def test_where_it_cannot_be_it_is_refused(flags, said):
    with pytest.raises(UserError, match=said):
        make_config(TrainConfig, flags)


def test_pages_need_a_gpu():
    pytest.importorskip("bitsandbytes")
    with pytest.raises(UserError, match="use adamw_8bit"):
        make_optimizer(Small(), OptimizerOptions(1e-2, name="paged_adamw_8bit"), torch.device("cpu"))
