"""Loading holds one shard beside the weights: resident memory of a process of its own, from the kernel's counters."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from test_published_layouts import LLADA, tensor_shapes, write

SHARDS, LAYERS = 6, 12
LOADING = """
import json, sys
from pathlib import Path
import torch
from diffdpo.models.load import load_model
folder, small, dtype, nf4 = sys.argv[1:]
def status(key):
    return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(key))
warm = load_model(small, dtype=dtype, load_in_4bit=nf4 == "True")  # everything imported, kernels and caches set up
Path("/proc/self/clear_refs").write_text("5")  # resets the peak
before = status("VmRSS")
model = load_model(folder, dtype=dtype, load_in_4bit=nf4 == "True").model
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
    ("dtype", "nf4", "shards"),
    [
        ("bfloat16", False, 1.5),
        pytest.param("float32", False, 1.5, marks=pytest.mark.slow),
        pytest.param("bfloat16", True, 2.5, marks=pytest.mark.slow),  # and what bitsandbytes quantises a matrix with
    ],
)
def test_at_most_about_one_shard_is_held_beside_the_weights(dtype, nf4, shards, checkpoint, command, python):
    if nf4 and importlib.util.find_spec("bitsandbytes") is None:
        pytest.skip("bitsandbytes is not installed")
    large, small = str(checkpoint / "large"), str(checkpoint / "small")
    done = command([python, "-c", LOADING, large, small, dtype, str(nf4)], timeout=200)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    shard = max(path.stat().st_size for path in (checkpoint / "large").glob("*.safetensors"))
    print(f"weights {found['weights'] >> 20} MiB, shard {shard >> 20} MiB, above {found['above'] / 2**20:.1f} MiB")
    assert found["above"] < shards * shard
    assert found["weights"] > 0.9 * shard  # else nothing is shown
