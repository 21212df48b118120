"""The forward of a block-causal family: clean tokens once, noisy rows over them; together, or either part alone.

    block_log_probs(module, ids, lengths, row, position, target, *clean)              both parts, one graph: logp [M]
    block_log_probs(module, no rows ..., *clean)                                      the clean part: what it keeps
    block_log_probs(module, ids, lengths, row, position, target, *clean, *kept)       rows against what was kept: logp
    [M]

`clean` is (answer_R, stream_A, ids_AT, length_A, start_A, shared_A): whose each row is, which answers' clean tokens are
in the stream, and the fields of `CleanAnswers`. What is kept are the keys and values of every layer [layers, 2, C, G,
D] and, for shifted logits, the hidden states at the blocks' ends [C / block, K], which predict the first tokens of the
next blocks.

Shapes: R rows, T padded length, A answers, C clean tokens, M scored positions, K hidden size, G key/value heads, D head
size.
"""

from typing import Any

import torch
from torch import Tensor

from diffdpo.models.architecture.block_layout import BlockLayout, block_layout


def block_log_probs(
    module: Any,
    input_ids_RT: Tensor,
    lengths_R: Tensor,
    row_M: Tensor,
    position_M: Tensor,
    target_M: Tensor,
    *clean: Tensor,
) -> Tensor | tuple[Tensor, Tensor]:
    """Log-probabilities of masked tokens from one clean stream a pair. ValueError for rows without clean tokens."""
    if len(clean) not in (6, 8):
        raise ValueError(f"{module.spec.name} is block-causal: rows need the clean tokens of their answers beside them")
    answer_R, stream_A, ids_AT, length_A, start_A, shared_A = clean[:6]
    kept = clean[6:]
    layout = block_layout(
        block_size=block_of(module),
        answer_R=answer_R,
        lengths_R=lengths_R,
        stream_A=stream_A,
        length_A=length_A,
        start_A=start_A,
        shared_A=shared_A,
        row_width=input_ids_RT.shape[1],
        clean_width=ids_AT.shape[1],
        device=input_ids_RT.device,
        past=[(k, v) for k, v in kept[0]] if kept else None,
        keep=not len(lengths_R),
        flex=module.flex,
    )
    ids_N = torch.cat([ids_AT.flatten()[layout.clean_index], input_ids_RT.flatten()[layout.row_index]])
    module.counted.computed += len(layout)
    if not len(lengths_R):
        return _run_clean(module, ids_N, layout)
    row_place_M = layout.offset_R[row_M] + position_M - module.spec.logit_shift
    if not module.spec.logit_shift:
        return module.log_probs(module.hidden_states(ids_N, layout, layout.clean_tokens + row_place_M), target_M)
    clean_M = _predicted_by_clean(module, layout, answer_R[row_M], position_M, start_A)
    if not kept:
        keep_M = torch.where(clean_M >= 0, clean_M, layout.clean_tokens + row_place_M)
        return module.log_probs(module.hidden_states(ids_N, layout, keep_M), target_M)
    noisy_M = clean_M < 0
    hidden_MK = module.hidden_states(ids_N, layout, row_place_M[noisy_M])
    at_M = torch.where(noisy_M, len(kept[1]) + noisy_M.cumsum(0) - 1, clean_M // block_of(module))
    return module.log_probs(torch.cat([kept[1], hidden_MK])[at_M], target_M)


def block_of(module: Any) -> int:
    """Tokens of a block."""
    assert module.spec.block_size, "asked for families that have blocks"
    return module.spec.block_size


def _run_clean(module: Any, ids_N: Tensor, layout: BlockLayout) -> tuple[Tensor, Tensor]:
    """Keys and values, and hidden states at the ends of blocks where logits are shifted (else none of them)."""
    block = block_of(module)
    blocks = len(layout) // block if module.spec.logit_shift else 0
    ends = block * torch.arange(1, blocks + 1, device=ids_N.device) - 1
    hidden = module.hidden_states(ids_N, layout, ends)
    assert layout.kept is not None
    return torch.stack([torch.stack(layout.kept[layer]) for layer in range(len(layout.kept))]), hidden


def _predicted_by_clean(
    module: Any, layout: BlockLayout, answer_M: Tensor, position_M: Tensor, start_A: Tensor
) -> Tensor:
    """Where in the clean part the output is that predicts each scored token; -1 for one that its row predicts.

    With shifted logits the first token of a block is predicted by the clean token before it: the noisy one is of
    another block, whose mask has nothing to do with it.
    """
    shift, block = module.spec.logit_shift, block_of(module)
    clean_M = torch.full_like(position_M, -1)
    absolute_M = start_A[answer_M] + position_M
    if absolute_M.numel() and int(absolute_M.min()) < shift:
        raise ValueError(f"{module.spec.name} never predicts position 0: a scored token needs one before it")
    first_M = absolute_M % block == 0
    for answer in answer_M[first_M].unique().tolist():
        index_C = layout.stream.index(answer).to(position_M.device)
        here_M = first_M & (answer_M == answer)
        clean_M[here_M] = index_C[absolute_M[here_M] - shift]
    return clean_M
