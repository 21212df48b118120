"""Prompts and their answers under construction, on the CPU.

Shapes: R rows, T padded length, B window length.
"""

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

from diffdpo.models.architecture.spec import FamilySpec


class Canvas:
    """Row r is its prompt followed by `gen_length` tokens, all masks at first, then padding.

    Of a block-causal family the masks go on to the end of a block; the answer is of at most `gen_length` tokens.
    """

    def __init__(
        self, prompts: Sequence[Sequence[int]], seeds: Sequence[tuple[int, ...]], *, spec: FamilySpec, gen_length: int
    ):
        self.mask_token_id = spec.mask_token_id
        self.terminators = torch.tensor(sorted(spec.terminators))
        self.generators = [_generator(seed) for seed in seeds]
        self.gen_length = gen_length
        self.prompt_length_R = torch.tensor([len(prompt) for prompt in prompts])
        block = spec.block_size or 1
        self.lengths = [-(-(len(prompt) + gen_length) // block) * block for prompt in prompts]
        self.ids_RT = torch.full((len(prompts), max(self.lengths)), spec.pad_token_id)
        for row, prompt in enumerate(prompts):
            self.ids_RT[row, : len(prompt)] = torch.tensor(prompt, dtype=torch.long)
            self.ids_RT[row, len(prompt) : self.lengths[row]] = spec.mask_token_id

    def __len__(self) -> int:
        return len(self.lengths)

    def window(self, start: int, length: int) -> Tensor:
        """Positions [R, B] of `length` answer tokens from `start`, each row counted from the end of its prompt."""
        return self.prompt_length_R[:, None] + start + torch.arange(length)

    def masked(self, window_RB: Tensor) -> Tensor:
        return self.ids_RT.gather(1, window_RB) == self.mask_token_id

    def reveal(self, row_M: Tensor, position_M: Tensor, token_M: Tensor) -> None:
        self.ids_RT[row_M, position_M] = token_M

    def noise(self, row_M: Tensor, width: int, device: torch.device | str = "cpu") -> Tensor:
        """fp64 uniforms [M, width]; line i comes from the generator of row `row_M[i]`; `row_M` is ascending.

        One generator per prompt makes its noise independent of its neighbours, and of how many lines are asked for at
        a time. Drawn on the CPU: equal on every device.
        """
        rows, counts = row_M.unique_consecutive(return_counts=True)
        parts = [
            torch.rand(count, width, generator=self.generators[row], dtype=torch.float64)
            for row, count in zip(rows.tolist(), counts.tolist(), strict=True)
        ]
        return torch.cat(parts).to(device)

    def without_prompts(self) -> Tensor:
        """The rows with their prompts masked: the unconditional input of classifier-free guidance."""
        in_prompt_RT = torch.arange(self.ids_RT.shape[1]) < self.prompt_length_R[:, None]
        return self.ids_RT.masked_fill(in_prompt_RT, self.mask_token_id)

    def region(self, row: int) -> list[int]:
        """The answer tokens of a row, masks included."""
        return self.ids_RT[row, self.prompt_length_R[row] : self.lengths[row]].tolist()

    def ended(self, row: int) -> bool:
        """Whether the answer is known: no mask stands before its first terminator."""
        return self.mask_token_id not in self.answer(row) and len(self.answer(row)) < self.gen_length

    def answer(self, row: int) -> list[int]:
        """The tokens before the first terminator."""
        region = torch.tensor(self.region(row)[: self.gen_length])
        ends = torch.isin(region, self.terminators).nonzero()
        return region[: int(ends[0]) if len(ends) else None].tolist()


def _generator(seed: tuple[int, ...]) -> torch.Generator:
    digest = hashlib.blake2b(repr(seed).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest) >> 1)
