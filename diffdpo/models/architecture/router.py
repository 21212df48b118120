"""The router of a mixture of experts: which experts see a token, and how much each counts; trained or frozen.

Routers are frozen unless `--train_router` asks for them: `train_routers` for training of all weights,
`whole_with_routers` beside a LoRA adapter. What is trained is the weight. It gets its gradient through the experts'
weights in the sum; which experts are chosen has none, and the selection bias, which has a say in the choice alone,
stays as it is.

How evenly a trained router spreads its tokens is reported as the balance loss of Switch Transformers (Fedus et al.,
arXiv 2101.03961, eq. 4; scores normalised over experts as in DeepSeek-V3, arXiv 2412.19437, eq. 18), E Σ_e f_e P_e: 1
when level, E when all go to one. It is no part of the training loss, whose gradient would else depend on how rows are
cut into forwards.

Shapes: N tokens, K hidden size, E experts, T experts of a token, G groups, L layers with experts.
"""

from typing import Any

import torch
from torch import Tensor, nn

from diffdpo.errors import UserError
from diffdpo.models.architecture.backbone import native


class Router(nn.Module):
    """A sigmoid router with a selection bias, in fp32 (or wider).

    `spread`: [2, E] sums since they were last taken, where the weight is trained: choices, and normalised scores.
    """

    def __init__(self, *, experts: int, size: int, groups: int, best_groups: int, experts_of_token: int, scale: float):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, size))
        self.expert_bias = nn.Parameter(torch.zeros(experts))
        self.groups, self.best_groups = groups, best_groups
        self.experts_of_token, self.scale = experts_of_token, scale
        self.spread: Tensor | None = None

    def forward(self, h_NK: Tensor) -> tuple[Tensor, Tensor]:
        """(experts [N, T], weights [N, T]): the bias has a say in the choice, not in the weights."""
        wide = torch.promote_types(h_NK.dtype, torch.float32)
        score_NE = (h_NK.to(wide) @ self.weight.to(wide).T).sigmoid()
        choice_NGE = (score_NE + self.expert_bias.to(wide)).unflatten(-1, (self.groups, -1))
        group_NG = choice_NGE.topk(2, dim=-1).values.sum(-1)
        in_best_NG = torch.zeros_like(group_NG, dtype=torch.bool)
        in_best_NG.scatter_(1, group_NG.topk(self.best_groups, dim=-1).indices, True)
        choice_NE = choice_NGE.masked_fill(~in_best_NG[..., None], -torch.inf).flatten(1)
        expert_NT = choice_NE.topk(self.experts_of_token, dim=-1).indices
        weight_NT = score_NE.gather(1, expert_NT)
        if self.experts_of_token > 1:
            weight_NT = weight_NT / (weight_NT.sum(-1, keepdim=True) + 1e-20)
        if self.weight.requires_grad and torch.is_grad_enabled():
            self._count(score_NE.detach(), expert_NT)
        if (
            self.expert_bias.requires_grad
        ):  # peft trains a module as a whole: a gradient of 0 is no change, none an error
            weight_NT = weight_NT + 0 * self.expert_bias.to(wide)[expert_NT]
        return expert_NT, weight_NT * self.scale

    def _count(self, score_NE: Tensor, expert_NT: Tensor) -> None:
        chosen_E = torch.bincount(expert_NT.flatten(), minlength=score_NE.shape[1]).to(score_NE.dtype)
        own = torch.stack([chosen_E, (score_NE / score_NE.sum(1, keepdim=True)).sum(0)])
        self.spread = own if self.spread is None else self.spread + own


def train_routers(model: nn.Module) -> None:
    """From now on `requires_grad_(True)` of the model is of its routers' weights too. UserError where it has none."""
    base: Any = native(model)
    check_router(type(base), base.config.model_type)
    base.trains_router = True


def check_router(model_class: Any, name: str) -> None:
    """UserError for `--train_router` of a family without one."""
    if model_class.router_name is None:
        raise UserError(f"--train_router: models of type {name!r} have no router; leave it out")


def whole_with_routers(model: nn.Module, names: str | None) -> str:
    """`--lora_modules_to_save` with the routers beside. UserError where the model has none."""
    base: Any = native(model)
    check_router(type(base), base.config.model_type)
    return ",".join(dict.fromkeys([*filter(None, (names or "").split(",")), base.router_name]))


def take_spread(model: nn.Module) -> Tensor | None:
    """[L, 2, E] sums of the trained routers since the last call, 0 for one that met no token; None without any."""
    trained = [m for m in model.modules() if isinstance(m, Router) and m.weight.requires_grad]
    if not trained:
        return None
    device = next((m.spread.device for m in trained if m.spread is not None), None)
    found = [torch.zeros(2, m.expert_bias.numel()) if m.spread is None else m.spread.float() for m in trained]
    for module in trained:
        module.spread = None
    return torch.stack([sums.to(device) for sums in found])


def balance_loss(spread_L2E: Tensor) -> float:
    """E Σ_e f_e P_e, the mean over layers; NaN where no token was met."""
    share_L2E = spread_L2E.double() / spread_L2E.double().sum(-1, keepdim=True)
    return float((share_L2E.shape[-1] * share_L2E.prod(1).sum(-1)).mean())
