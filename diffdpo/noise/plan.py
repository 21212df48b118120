"""Noise as a value: which tokens of an answer are masked, which are scored, and with what weight.

A plan is a pure function of its :class:`NoiseKey`, drawn on the CPU by a counter-based generator, so policy and
reference, every rank, engine and micro-batch size, and a resumed run see the same masks. The estimators themselves are
in ``estimators.py``; nothing here knows a model or torch.

Shape suffixes: N rows (forwards) of one answer, L its scored tokens.
"""

import hashlib
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class NoiseKey:
    """What noise depends on, and all it depends on. ``side`` is 0 for chosen, 1 for rejected; ``draw`` asks for
    further independent noise of the same answer (say, other rows for the loss's coefficient than for its gradient)."""

    seed: int
    epoch: int
    record_id: str
    side: int
    draw: int = 0

    def generator(self) -> np.random.Generator:
        """Philox (Salmon et al., SC 2011) keyed by a hash of all fields; the same on every platform."""
        text = f"{self.seed}\x1f{self.epoch}\x1f{self.side}\x1f{self.draw}\x1f{self.record_id}"
        digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
        return np.random.Generator(np.random.Philox(key=np.frombuffer(digest, dtype="<u8").astype(np.uint64)))


@dataclass(frozen=True)
class NoisePlan:
    """N rows for one answer. The score is estimated by  Σ_n weight_n Σ_{i scored in n} scale_ni log p(y_i | row n).

    ``masked_NL``  bool, tokens replaced by the mask token.
    ``scored_NL``  bool, tokens whose log-probability counts; a subset of the masked ones.
    ``weight_N``   float64.
    ``share_N``    float64, tokens of the answer that row n stands for, Σ = L. Where rows are drawn alike it is L / N.
                   Only the standard error uses it; 0 where nothing is random (``exact``).
    ``scale_NL``   float64 weight of a token within its row, or None for 1 everywhere; may be negative.
    ``block_N``    int64 below N: rows of one block were laid out together, those of two blocks independently of each
                   other. None: every row is a block.
    ``cell_N``     int64 below N, one for each block: blocks of one cell differ by chance alone, or nearly so. None: all
                   rows are in one cell. The standard error compares blocks within their cells, and uses nothing else.
    """

    masked_NL: np.ndarray
    scored_NL: np.ndarray
    weight_N: np.ndarray
    share_N: np.ndarray
    scale_NL: np.ndarray | None = None
    block_N: np.ndarray | None = None
    cell_N: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.weight_N)

    def estimate(self, f_NL: np.ndarray) -> float:
        """The score, given each row's token log-probabilities; for tests and small studies."""
        scale_NL = 1.0 if self.scale_NL is None else self.scale_NL
        return float(self.weight_N @ np.where(self.scored_NL, scale_NL * f_NL, 0.0).sum(1))
