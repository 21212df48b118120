"""Which records are held out: decided by prompt, so that no prompt is both trained on and evaluated on."""

import numpy as np

from data_pipeline.errors import DataError
from data_pipeline.records import stable_hash


def eval_mask(prompts: np.ndarray, fraction: float, seed: int = 0) -> np.ndarray:
    """Which records are held out: the given fraction of the *prompts* (at least one), by the hash of each.

    A prompt's place depends on the prompt (and the seed), not on what other data stand beside it or in what order.
    """
    salted = prompts ^ np.uint64(stable_hash("split", str(seed)))
    unique = np.unique(salted)
    count = max(1, round(fraction * len(unique)))
    if count >= len(unique):
        remedy = "lower it" if len(unique) > 1 else "set it to 0 and name other data to evaluate on"
        found = f"{len(unique)} prompts" if len(unique) != 1 else "a single prompt"
        raise DataError(f"eval_fraction {fraction} of {found} leaves nothing to train on; {remedy}")
    # the hashes are uniform, but their order under xor with a salt is not a fresh draw: mix the bits once more
    return _mix(salted) <= np.sort(_mix(unique))[count - 1]


def _mix(values: np.ndarray) -> np.ndarray:
    """The finaliser of splitmix64 (Steele et al. 2014): a bijection whose output bits depend on all input bits."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
