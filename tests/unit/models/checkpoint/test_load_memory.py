"""Loading holds one shard beside the weights: resident memory of a process of its own, from the kernel's counters.

There malloc gives every buffer of 64 KiB or more back at once (`MALLOC_MMAP_THRESHOLD_`), so that what is resident is
what is held and not what the heap keeps, which changes from run to run.
"""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.support.published import LLADA, tensor_shapes, write

SHARDS, LAYERS = 6, 12
LOADING = """
import json, sys
from pathlib import Path
import torch
from transformers import AutoModel
from diffdpo.models.load import load_model
folder, small, how, dtype = sys.argv[1:]
def load(folder):
    if how == "from_pretrained":
        return AutoModel.from_pretrained(folder, dtype=dtype)
    return load_model(folder, dtype=dtype, load_in_4bit=how == "nf4").model
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
warm = load(small)  # everything imported, kernels and caches set up
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
model = load(folder)
weights = sum(p.nbytes for p in {id(p): p for p in model.parameters()}.values())
print(json.dumps({"above": status("VmHWM") - before - weights, "weights": weights}))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tokenizer):
    """About 150 MiB in six shards of 25 MiB; the tensors of a layer lie in several."""
    folder = tmp_path_factory.mktemp("checkpoint")
    write(folder / "small", LLADA, tokenizer)
    config = LLADA | {"d_model": 768, "mlp_hidden_size": 2048, "n_layers": LAYERS, "n_heads": 12, "n_kv_heads": 12}
    write(folder / "large", LLADA, tokenizer, shards=1)
    (folder / "large" / "config.json").write_text(json.dumps(config))
    (folder / "large" / "model-00001-of-00001.safetensors").unlink()
    shapes, where = tensor_shapes(config), {}
    for shard in range(SHARDS):
        file = f"model-{shard + 1:05}-of-{SHARDS:05}.safetensors"
        part = {name: torch.ones(shapes[name], dtype=torch.bfloat16) for name in sorted(shapes)[shard::SHARDS]}
        save_file(part, folder / "large" / file, {"format": "pt"})
        where |= dict.fromkeys(part, file)
    (folder / "large" / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux's memory counters")
@pytest.mark.parametrize(
    ("how", "dtype", "shards"),
    [
        ("load_model", "bfloat16", 1.5),
        ("from_pretrained", "float32", 1.5),
        pytest.param("load_model", "float32", 1.5, marks=pytest.mark.slow),
        pytest.param("nf4", "bfloat16", 2.0, marks=pytest.mark.slow),  # and what bitsandbytes quantises a matrix with
    ],
)
def test_at_most_about_one_shard_is_held_beside_the_weights(how, dtype, shards, checkpoint, command, python):
    if how == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    arguments = [str(checkpoint / "large"), str(checkpoint / "small"), how, dtype]
    done = command([python, "-c", LOADING, *arguments], timeout=200, MALLOC_MMAP_THRESHOLD_=str(2**16))
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    shard = max(path.stat().st_size for path in (checkpoint / "large").glob("*.safetensors"))
    print(f"weights {found['weights'] >> 20} MiB, shard {shard >> 20} MiB, above {found['above'] / 2**20:.1f} MiB")
    assert found["above"] < shards * shard
    assert found["weights"] > 0.9 * shard  # else nothing is shown
