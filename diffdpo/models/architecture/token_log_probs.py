"""log p(target) of a softmax over the vocabulary, without ever holding a [tokens, vocabulary] matrix above a budget.

For one token with hidden state h, head W and target y:   logp = W_y h - logsumexp(W h),
    d logp / dh = W_y - p W          (p the softmax; known in the forward)
    d logp / dW = (onehot_y - p) h^T (recomputed chunk by chunk in the backward)

So with a frozen head (LoRA) the forward already yields the whole Jacobian, an [M, hidden] matrix, and the backward
is one multiplication: the cost of the plain way with none of its memory. With a trainable head, logits that fit the
budget are kept as probabilities; others are recomputed.

Shapes: M tokens, C tokens of one chunk, K hidden size, V vocabulary.
"""

import torch
from torch import Tensor

from diffdpo.errors import UserError
from diffdpo.gpus import is_gpu

DEFAULT_LOGITS_BUDGET = 256 * 2**20
"""Bytes of the largest logits chunk, fp32."""
LIGER_TOLERANCE = {4: 1e-2, 2: 3e-2}
"""By bytes of a number: TF32 products are allowed, and half precision that rounds elsewhere (0.7 % seen in bf16). A
wrong gradient is off by its own size."""


def token_log_probs(hidden_MK: Tensor, weight_VK: Tensor, target_M: Tensor, *, logits_budget: int | None) -> Tensor:
    """log softmax(hidden W^T)[target] in nats, float32 (float64 for fp64 weights), shape [M].

    `logits_budget`: bytes; a chunk of logits holds at least one token. None is DEFAULT_LOGITS_BUDGET.
    """
    budget = DEFAULT_LOGITS_BUDGET if logits_budget is None else logits_budget
    return _TokenLogProbs.apply(hidden_MK, weight_VK, target_M, budget, torch.is_grad_enabled())


@torch.no_grad()
def token_and_best_log_probs(
    hidden_MK: Tensor, weight_VK: Tensor, target_M: Tensor, *, logits_budget: int | None
) -> Tensor:
    """[M, 2]: ``token_log_probs``, and the same of the token that is likeliest in each place. No gradient."""
    found = [hidden_MK.new_empty(0, 2, dtype=_wide(hidden_MK.dtype))]
    for chunk in _chunks(hidden_MK, weight_VK, DEFAULT_LOGITS_BUDGET if logits_budget is None else logits_budget):
        logits_CV = _logits(hidden_MK[chunk], weight_VK)
        both_C2 = torch.stack((logits_CV.gather(-1, target_M[chunk, None])[:, 0], logits_CV.amax(-1)), dim=1)
        found.append(both_C2 - logits_CV.logsumexp(-1, keepdim=True))
    return torch.cat(found)


def liger_log_probs(hidden_MK: Tensor, weight_VK: Tensor, target_M: Tensor) -> Tensor:
    """``token_log_probs`` by Liger's fused linear cross-entropy (Triton, GPU only), recomputed in the backward.

    Worth trying with a trainable head; a frozen head's gradient is cheaper above.
    """
    from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

    return -LigerFusedLinearCrossEntropyLoss(reduction="none")(weight_VK, hidden_MK, target_M).float()


def check_liger(device: torch.device | str, dtype: torch.dtype = torch.float32) -> None:
    """UserError unless Liger's kernel gives our numbers on a small example in fp32 and in `dtype`.

    With a trained and with a frozen head, which take different ways through it. Its `reduction="none"` took the first
    token's upstream gradient for every token until linkedin/Liger-Kernel#1298 (July 2026): right losses, wrong
    gradients, no message.
    """
    for kind in dict.fromkeys((torch.float32, dtype)):
        for train_head in (True, False):
            for what, off in _liger_against_ours(device, kind, train_head).items():
                if not off <= LIGER_TOLERANCE[kind.itemsize]:
                    raise UserError(
                        f"this version of liger-kernel gives other {what} (off by {off:.1e} in {kind}): install the "
                        "one of constraints.txt, or leave --use_liger_kernel out"
                    )


def _liger_against_ours(device: torch.device | str, dtype: torch.dtype, train_head: bool) -> dict[str, float]:
    """Relative distances of the scores and of their gradients, 24 tokens of a vocabulary of 512."""
    generator = torch.Generator().manual_seed(0)
    hidden, weight, upstream = (
        torch.randn(shape, generator=generator).to(device) for shape in ((24, 64), (512, 64), (24,))
    )
    hidden, weight = hidden.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(train_head)
    target = torch.randint(0, 512, (24,), generator=generator).to(device)
    leaves, found = [hidden, weight][: 1 + train_head], []
    for logp in (liger_log_probs(hidden, weight, target), token_log_probs(hidden, weight, target, logits_budget=None)):
        found.append([t.float() for t in (logp.detach(), *torch.autograd.grad(logp, leaves, upstream))])
    names = ("scores", "gradients", "weight gradients")
    return {what: ((a - b).norm() / b.norm()).item() for what, a, b in zip(names, *found, strict=False)}


def _chunks(hidden: Tensor, weight: Tensor, budget: int) -> list[slice]:
    rows = max(1, budget // (weight.shape[0] * _wide(hidden.dtype).itemsize))
    return [slice(start, start + rows) for start in range(0, max(1, hidden.shape[0]), rows)]


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _logits(hidden_CK: Tensor, weight_VK: Tensor) -> Tensor:
    """[C, V] in fp32 or wider, on a GPU straight from the sums of products: rounded to bf16 before, a logit of 18 is
    off by 0.03, and an update changes it by no more."""
    if hidden_CK.dtype.itemsize == 2 and (is_gpu(hidden_CK.device) or hidden_CK.is_meta):  # meta: a GPU, planned
        return torch.mm(hidden_CK, weight_VK.T, out_dtype=torch.float32)
    return (hidden_CK @ weight_VK.T).to(_wide(hidden_CK.dtype))


def _probabilities(hidden_CK: Tensor, weight_VK: Tensor, target_C: Tensor) -> tuple[Tensor, Tensor]:
    """(softmax [C, V], logp of the targets [C]); one [C, V] matrix, worked on in place."""
    logits = _logits(hidden_CK, weight_VK)
    logits -= logits.amax(dim=-1, keepdim=True)
    target_logit = logits.gather(-1, target_C[:, None]).squeeze(-1)
    total = logits.exp_().sum(-1, keepdim=True)
    return logits.div_(total), target_logit - total.squeeze(-1).log()


class _TokenLogProbs(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden, weight, target, budget, needs_grad):
        chunks = _chunks(hidden, weight, budget)
        need_hidden, need_weight = (needs_grad and need for need in ctx.needs_input_grad[:2])
        fits = len(chunks) == 1
        logp, jacobian, p = [], [], None
        for chunk in chunks:
            p, logp_C = _probabilities(hidden[chunk], weight, target[chunk])
            logp.append(logp_C)
            if need_hidden and not need_weight:
                jacobian.append(weight[target[chunk]] - p.to(weight.dtype) @ weight)
        ctx.chunks, ctx.frozen_head = chunks, bool(jacobian)
        if jacobian:
            ctx.save_for_backward(torch.cat(jacobian))
        elif need_weight:
            ctx.save_for_backward(hidden, weight, target, *([p] if fits else []))
        return torch.cat(logp)

    @staticmethod
    def backward(ctx, grad_M):
        if ctx.frozen_head:
            (jacobian,) = ctx.saved_tensors
            return (jacobian * grad_M[:, None]).to(jacobian.dtype), None, None, None, None
        hidden, weight, target, *kept = ctx.saved_tensors
        grad_hidden, grad_weight = [], None
        for chunk in ctx.chunks:
            p = kept[0] if kept else _probabilities(hidden[chunk], weight, target[chunk])[0]
            grad_logits = p * -grad_M[chunk, None] if kept else p.mul_(-grad_M[chunk, None])
            grad_logits.scatter_add_(-1, target[chunk, None], grad_M[chunk, None])
            grad_logits = grad_logits.to(weight.dtype)
            grad_hidden.append(grad_logits @ weight)
            if grad_weight is None:
                grad_weight = grad_logits.T @ hidden[chunk]
            else:  # in place: a second [V, K] matrix is 1 GiB at 8B
                grad_weight.addmm_(grad_logits.T, hidden[chunk])
        return torch.cat(grad_hidden), grad_weight, None, None, None
