"""What a reference score depends on, as a small dictionary, and its fingerprint.

The keys are what a user is told when two of them differ. Batch sizes, the number of processes and the device are left
out on purpose: they move a score in its last bits only (see docs/training.md) and are written into each part instead.
"""

import hashlib
import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields
from typing import Any

import numpy as np

from data_pipeline.encode import Encoder
from data_pipeline.shards import file_sha256
from diffdpo.models.architecture.spec import FamilySpec
from diffdpo.models.checkpoint.adapter_folder import ADAPTER_CONFIG, base_of_adapter, is_adapter
from diffdpo.models.checkpoint.weights import checkpoint_folder
from diffdpo.noise.estimators import MAX_EXACT_LENGTH, draw_plan
from diffdpo.noise.options import NoiseOptions
from diffdpo.noise.plan import NoiseKey
from diffdpo.noise.rows import ALIKE

HASHED_FILES = ("*.safetensors", "config.json", ADAPTER_CONFIG)
PROBE_LENGTHS = (1, MAX_EXACT_LENGTH - 5, MAX_EXACT_LENGTH)


def identity_of(
    *, weights: str, dtype: str, encoder: Encoder, spec: FamilySpec, noise: NoiseOptions, data_fingerprint: str
) -> dict[str, Any]:
    """All that decides a score but the record and the epoch. ``weights`` from :func:`weights_digest`."""
    encoding = {field.name: getattr(encoder, field.name) for field in fields(Encoder) if field.init}
    tokenizer = encoding.pop("tokenizer")
    return {
        "reference_weights": weights,
        "dtype": dtype,
        "data": data_fingerprint,
        "tokenizer": tokenizer_digest(tokenizer),
        **{name: _plain(value) for name, value in encoding.items()},
        "mask_token_id": spec.mask_token_id,
        "logit_shift": spec.logit_shift,
        "score_estimator": noise.estimator,
        "num_mc_samples": noise.num_samples,
        "num_diffusion_steps": noise.num_diffusion_steps,
        "seed": noise.seed,
        "noise": noise_digest(noise),
    } | (_of_blocks(spec, noise) | ({} if noise.ld_alpha is None else {"ld_alpha": noise.ld_alpha}))


def _of_blocks(spec: FamilySpec, noise: NoiseOptions) -> dict[str, Any]:
    """What else decides a score of a block-causal family; nothing where attention is full."""
    return {"block_size": spec.block_size, "fill_with": noise.fill_with} if spec.block_size else {}


def fingerprint(identity: dict[str, Any]) -> str:
    """16 hex digits of an identity."""
    return _digest(json.dumps(identity, sort_keys=True).encode())


def weights_digest(name_or_path: str, *, base: str | None = None) -> str:
    """16 hex digits of a checkpoint's weights and config files, by content; of an adapter, with its base's (``base``
    where it is not the one that the adapter names).

    Read from disk, at the disk's or sha256's speed, one thread a file: no model is loaded.
    """
    folder = checkpoint_folder(name_or_path)
    paths = sorted(path for pattern in HASHED_FILES for path in folder.glob(pattern))
    with ThreadPoolExecutor() as pool:
        digests = [f"{path.name} {digest}" for path, digest in zip(paths, pool.map(file_sha256, paths), strict=True)]
    if is_adapter(folder):
        digests.append(weights_digest(base or base_of_adapter(folder)))
    return _digest("\n".join(digests).encode())


def tokenizer_digest(tokenizer: Any) -> str:
    """16 hex digits of what turns text into tokens: vocabulary, merges, normalisation, chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    rules = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return _digest(f"{rules}\x1f{tokenizer.chat_template}".encode())


def noise_digest(noise: NoiseOptions) -> str:
    """16 hex digits of the rows drawn for a few answers: another version's estimator of the same name shows."""
    hashed = hashlib.blake2b(str(ALIKE).encode() if noise.estimator == "balanced" else b"", digest_size=8)
    for length in PROBE_LENGTHS:
        key = NoiseKey(noise.seed, 0, "probe", 1)
        steps, count = noise.num_diffusion_steps, noise.num_samples
        plan = draw_plan(noise.estimator, length=length, num_samples=count, key=key, num_diffusion_steps=steps)
        for array in (plan.masked_NL, plan.scored_NL, plan.weight_N, plan.scale_NL):
            # in 32 bits: the last digits of a weight may depend on the machine's mathematical library
            hashed.update(b"" if array is None else array.astype(np.float32).tobytes())
    return hashed.hexdigest()


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def _digest(data: bytes) -> str:
    return hashlib.blake2b(data, digest_size=8).hexdigest()
