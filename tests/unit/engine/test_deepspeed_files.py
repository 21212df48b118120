"""What DeepSpeed would write, copied: the same to the reader, and no longer touched by later steps."""

from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from diffdpo.engine.deepspeed_files import TAG, CheckpointFiles, copied, load_safely, write_files
from diffdpo.engine.tensor_files import read_weights
from diffdpo.errors import UserError


def state() -> dict:
    flat = torch.arange(6.0)
    return {
        "module": OrderedDict(weight=flat[:4].view(2, 2)),
        "groups": [(flat[4:], 3), {"betas": (0.9, 0.95), "shape": torch.Size([2, 2])}],
        0: None,
    }


def test_a_copy_is_equal_and_of_its_own():
    given = state()
    copy = copied(given)
    given["module"]["weight"].add_(100)
    given["groups"][1]["betas"] = ()
    assert torch.equal(copy["module"]["weight"], state()["module"]["weight"]) and type(copy["module"]) is OrderedDict
    assert torch.equal(copy["groups"][0][0], torch.tensor([4.0, 5.0])) and copy["groups"][0][1] == 3
    assert copy["groups"][1] == state()["groups"][1] and copy[0] is None
    assert copy["module"]["weight"].untyped_storage().nbytes() == 16, "a view's storage is left behind"


def test_what_is_kept_is_written_where_it_would_have_been(tmp_path):
    files = CheckpointFiles(None, nn.Linear(1, 1))
    with files.kept_in_memory(tmp_path / "a") as kept:
        files.save({"optimizer": torch.ones(2)}, str(tmp_path / "a" / "engine" / "x.pt"))
    assert not (tmp_path / "a").exists()
    write_files(tmp_path / "b", kept, {Path("note.txt"): b"n"})
    assert torch.equal(load_safely(tmp_path / "b" / "engine" / "x.pt")["optimizer"], torch.ones(2))
    assert (tmp_path / "b" / "note.txt").read_bytes() == b"n"
    files.save({"optimizer": torch.zeros(1)}, str(tmp_path / "y.pt"))
    assert (tmp_path / "y.pt").exists(), "afterwards it writes again"


def test_state_on_nvme_is_no_weights_to_read(tmp_path):
    (tmp_path / TAG / "offloaded_tensors").mkdir(parents=True)
    with pytest.raises(UserError, match=r"was on NVMe, .* are not read; take the run's final/ model$"):
        read_weights(tmp_path, nn.Linear(1, 1))
