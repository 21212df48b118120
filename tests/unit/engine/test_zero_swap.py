"""State that is elsewhere but for a moment: saved by name and put in place group by group, with a stand-in for
DeepSpeed's optimizer, of one process. The real one, on a disk: tests/distributed/test_nvme.py."""

from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from diffdpo.engine.tensor_files import whole_tensors
from diffdpo.engine.world import World
from diffdpo.engine.zero_swap import fill_swapped, state_by_name, write_swapped

WORLD = World(0, 0, 1, torch.device("cpu"))
PADDING = 3  # numbers behind each piece that are no weight's


class Disk:
    """As DeepSpeed's swapper: tensors are empty while their numbers are here."""

    def __init__(self, optimizer: torch.optim.Optimizer):
        self.optimizer, self.there, self.told = optimizer, {}, []

    def _tensors(self, flat):
        return [flat, *(t for t in self.optimizer.state[flat].values() if torch.is_tensor(t) and t.dim())]

    def swap_out_optimizer_state(self, parameter, async_swap):
        assert not async_swap
        self.there[parameter] = [t.data.clone() for t in self._tensors(parameter)]
        self.told.append("out")
        self._empty(parameter)

    def swap_in_optimizer_state(self, parameter, async_parameter):
        for tensor, numbers in zip(self._tensors(parameter), self.there[parameter], strict=False):
            tensor.data = numbers.clone()
        self.told.append("in")

    def release_swap_buffers(self, parameter):
        self.told.append("let go")
        self._empty(parameter)

    def _empty(self, parameter):
        for tensor in self._tensors(parameter):
            tensor.data = torch.empty(0)


class Sharded:
    """What of DeepSpeed's ZeRO-3 optimizer is asked for. The last group is small and stays."""

    def __init__(self, module: nn.Module, moments: bool):
        parameters = list(module.parameters())
        self.fp16_groups = [parameters[:2], parameters[2:3], parameters[3:]]
        self.fp32_partitioned_groups_flat, self.grad_position, self.renewed = [], {}, []
        self.persistent_parameters = []
        for number, group in enumerate(self.fp16_groups):
            pieces, offset = [], 0
            for p in group:
                p.ds_numel, p.ds_shape = p.numel(), p.shape
                self.grad_position[id(p)] = (number, offset, p.numel() + PADDING)
                pieces += [p.detach().flatten(), torch.full((PADDING,), 9.0)]
                offset += p.numel() + PADDING
            self.fp32_partitioned_groups_flat.append(nn.Parameter(torch.cat(pieces)))
        self.optimizer = torch.optim.AdamW(self.fp32_partitioned_groups_flat)
        self.optimizer_swapper = Disk(self.optimizer)
        for number, flat in enumerate(self.fp32_partitioned_groups_flat):
            if moments:
                state = {what: torch.randn_like(flat).detach() for what in ("exp_avg", "exp_avg_sq")}
                self.optimizer.state[flat] = {"step": torch.tensor(7.0), **state}
            if self._swappable_optimizer_subgroup(number):
                self.optimizer_swapper.swap_out_optimizer_state(flat, async_swap=False)

    def _swappable_optimizer_subgroup(self, group):
        return group < 2

    def get_param_id(self, parameter):
        return id(parameter)

    def _get_param_partition_rank(self, parameter):
        return 0

    def _reassign_or_swap_out_partitioned_parameters(self, group):
        self.renewed.append(group)

    def checkpoint_event_prologue(self):
        pass

    def checkpoint_event_epilogue(self):
        pass


def made(seed: int, *, moments: bool = True) -> tuple[SimpleNamespace, nn.Module]:
    torch.manual_seed(seed)
    module = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    return SimpleNamespace(optimizer=Sharded(module, moments)), module


def state_of(engine, module) -> dict[str, torch.Tensor]:
    return dict(state_by_name(engine, module, WORLD))


@pytest.mark.parametrize("fresh", [True, False])
def test_what_is_saved_is_put_in_place(fresh, tmp_path):
    engine, module = made(0)
    saved = state_of(engine, module)
    assert set(saved) == {
        n + what for n, _ in module.named_parameters() for what in ("", ".exp_avg", ".exp_avg_sq", ".step")
    }
    assert all(torch.equal(saved[name], parameter) for name, parameter in module.named_parameters())
    disk = engine.optimizer.optimizer_swapper
    assert disk.told[2:] == ["in", "let go"] * 2, "nothing is written where nothing has changed"
    write_swapped(tmp_path, engine, module, WORLD)
    other, its = made(1, moments=not fresh)  # of a run that has taken no step, and of one that goes back
    fill_swapped(other, its, whole_tensors(tmp_path, its))
    assert other.optimizer.renewed == [0, 1, 2], "one round to the disk a group"
    found = state_of(other, its)
    assert all(torch.equal(found[name], tensor) for name, tensor in saved.items())
    last = other.optimizer.fp32_partitioned_groups_flat[2]
    assert last[-PADDING:].tolist() == [9.0] * PADDING


def test_a_save_before_the_first_step_is_of_weights_and_goes_on(tmp_path):
    """A first step that was left out (its gradient was not finite) has made no moments."""
    engine, module = made(0, moments=False)
    write_swapped(tmp_path, engine, module, WORLD)
    assert state_of(engine, module).keys() == dict(module.named_parameters()).keys()
    assert not any(engine.optimizer.optimizer.state.get(f) for f in engine.optimizer.fp32_partitioned_groups_flat)
    for moments in (False, True):  # into a run that has taken no step, and into one whose steps are given up
        other, its = made(1, moments=moments)
        fill_swapped(other, its, whole_tensors(tmp_path, its))
        found = state_of(other, its)
        assert all(torch.equal(found[name], parameter) for name, parameter in module.named_parameters())
        rest = [tensor for name, tensor in found.items() if name not in dict(module.named_parameters())]
        assert bool(rest) is moments and not any(tensor.any() for tensor in rest)


def test_a_save_is_in_files_that_fit(tmp_path, monkeypatch):
    monkeypatch.setattr("diffdpo.engine.zero_swap.NUMBERS_A_FILE", 20)
    engine, module = made(0)
    write_swapped(tmp_path, engine, module, WORLD)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert {name for file in files for name in load_file(file)} == set(state_of(engine, module))


def test_a_full_disk_is_told(tmp_path):
    engine, module = made(0)
    with pytest.raises(OSError, match="No such file"):
        write_swapped(tmp_path / "not there", engine, module, WORLD)
