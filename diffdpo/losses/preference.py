"""Preference losses: pure functions of score vectors, each with its equation and paper.

Notation, per pair, in nats: S_w, S_l the policy's scores of the chosen and the rejected answer, R_w, R_l the
reference's, r = S - R the log-ratio of an answer, h = β (r_w - r_l) the preference logit, L_w, L_l tokens. Names,
defaults and values are those of TRL 1.16 (DPO, KTO and CPO trainers) where TRL has the loss; ``sigmoid`` differs in
that it honours ``label_smoothing``, and ``sft`` in that it averages over tokens within each answer rather than over the
batch. Scores are sums over tokens except where a name says otherwise (``ipo``, which TRL and its authors normalise by
length, ``sigmoid_norm``, ``simpo``, ``sft``).

Losses return one value a pair, summed by the caller and divided by a count over all ranks (``loss_count``).
``LOSSES`` says what a loss needs: losses of ``scope`` "batch" couple pairs (``aot`` sorts), so the scores of the global
batch must be gathered before them; ``reference_point`` is the scalar of :func:`reference_point_of`,
also over the global batch.

Shape suffixes: B pairs, 2 sides (0 chosen, 1 rejected).
"""

from __future__ import annotations  # the flags are declared here and are read before torch is imported

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import TYPE_CHECKING, ClassVar

from diffdpo.errors import UserError
from diffdpo.losses.divergence import remapped, wpo_weight
from diffdpo.settings.base import Settings, setting

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class LossParameters(Settings):
    """The losses' own parameters: a field here is a flag, and reaches every loss that has an argument of its name."""

    title: ClassVar[str] = "loss"

    label_smoothing: float = setting(
        0.0, "share of pairs assumed to be labelled the wrong way round", at_least=0, below=0.5
    )
    discopop_tau: float = setting(0.05, "temperature of the loss `discopop`")
    simpo_gamma: float = setting(0.5, "margin of the loss `simpo`")
    desirable_weight: float = setting(1.0, "weight of desirable answers in `kto` and `apo_zero_unpaired`", at_least=0)
    undesirable_weight: float = setting(1.0, "weight of undesirable answers in them", at_least=0)


# ------------------------------------------------------------------------------------------ losses of a pair


def preference_logit(policy_B2: Tensor, reference_B2: Tensor, beta: float) -> Tensor:
    """h_B = β [(S_w - R_w) - (S_l - R_l)]."""
    ratio_B2 = policy_B2 - reference_B2
    return beta * (ratio_B2[:, 0] - ratio_B2[:, 1])


def sigmoid(policy_B2: Tensor, reference_B2: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """DPO, -log σ(h) (Rafailov et al., arXiv 2305.18290, eq. 7); smoothed: -(1-ε) log σ(h) - ε log σ(-h) (cDPO)."""
    return _smoothed(preference_logit(policy_B2, reference_B2, beta), label_smoothing)


def robust(policy_B2: Tensor, reference_B2: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """[-(1-ε) log σ(h) + ε log σ(-h)] / (1-2ε): unbiased for flip rate ε (Chowdhury et al., arXiv 2403.00409)."""
    h = preference_logit(policy_B2, reference_B2, beta)
    return (-(1 - label_smoothing) * logsigmoid(h) + label_smoothing * logsigmoid(-h)) / (1 - 2 * label_smoothing)


def hinge(policy_B2: Tensor, reference_B2: Tensor, *, beta: float) -> Tensor:
    """max(0, 1 - h) (SLiC-HF on log-ratios, arXiv 2305.10425; RSO, arXiv 2309.06657)."""
    return (1 - preference_logit(policy_B2, reference_B2, beta)).relu()


def ipo(policy_B2: Tensor, reference_B2: Tensor, tokens_B2: Tensor, *, beta: float) -> Tensor:
    """(r_w/L_w - r_l/L_l - 1/(2β))²: IPO per token, as its authors ran it (arXiv 2310.12036, eq. 17; β is their τ)."""
    ratio_B2 = _per_token(policy_B2 - reference_B2, tokens_B2)
    return (ratio_B2[:, 0] - ratio_B2[:, 1] - 1 / (2 * beta)) ** 2


def ipo_sum(policy_B2: Tensor, reference_B2: Tensor, *, beta: float) -> Tensor:
    """(r_w - r_l - 1/(2β))²: IPO as written (arXiv 2310.12036, eq. 17)."""
    return (preference_logit(policy_B2, reference_B2, 1.0) - 1 / (2 * beta)) ** 2


def exo_pair(policy_B2: Tensor, reference_B2: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """KL(q || p), q = (σ(h), σ(-h)), p = (1-ε, ε), 0 < ε < 1 (EXO, arXiv 2402.00856, eq. 16)."""
    h = preference_logit(policy_B2, reference_B2, beta)
    log_pw, log_pl = math.log1p(-label_smoothing), math.log(label_smoothing)
    return h.sigmoid() * (logsigmoid(h) - log_pw) + (-h).sigmoid() * (logsigmoid(-h) - log_pl)


def nca_pair(policy_B2: Tensor, reference_B2: Tensor, *, beta: float) -> Tensor:
    """-log σ(β r_w) - ½ log σ(-β r_w) - ½ log σ(-β r_l) (NCA, arXiv 2402.05369)."""
    w, l = (beta * (policy_B2 - reference_B2)).unbind(1)
    return -logsigmoid(w) - 0.5 * logsigmoid(-w) - 0.5 * logsigmoid(-l)


def bco_pair(policy_B2: Tensor, reference_B2: Tensor, *, beta: float) -> Tensor:
    """-log σ(β r_w) - log σ(-β r_l) (BCO, arXiv 2404.04656, without its running shift)."""
    w, l = (beta * (policy_B2 - reference_B2)).unbind(1)
    return -logsigmoid(w) - logsigmoid(-l)


def sppo_hard(policy_B2: Tensor, reference_B2: Tensor, *, beta: float) -> Tensor:
    """(r_w - 1/(2β))² + (r_l + 1/(2β))² (SPPO with hard labels, arXiv 2405.00675, eq. 4.7)."""
    w, l = (policy_B2 - reference_B2).unbind(1)
    return (w - 0.5 / beta) ** 2 + (l + 0.5 / beta) ** 2


def apo_zero(policy_B2: Tensor, reference_B2: Tensor, *, beta: float) -> Tensor:
    """1 - σ(β r_w) + σ(β r_l): chosen answers are better than the model's (APO, arXiv 2408.06266, eq. 7)."""
    w, l = (beta * (policy_B2 - reference_B2)).unbind(1)
    return (-w).sigmoid() + l.sigmoid()


def apo_down(policy_B2: Tensor, reference_B2: Tensor, *, beta: float) -> Tensor:
    """σ(β r_w) + 1 - σ(h): chosen answers are worse than the model's (APO, arXiv 2408.06266, eq. 8)."""
    w, l = (beta * (policy_B2 - reference_B2)).unbind(1)
    return w.sigmoid() + (l - w).sigmoid()


def discopop(policy_B2: Tensor, reference_B2: Tensor, *, beta: float, discopop_tau: float) -> Tensor:
    """(1-μ)(-log σ(h)) + μ exp(-h), μ = σ(h/τ) (DiscoPOP, arXiv 2406.08414, eq. 5).

    For h → -∞ the product μ exp(-h) → 0 while its factors are 0 and ∞; hence one exponential.
    """
    h = preference_logit(policy_B2, reference_B2, beta)
    return (-h / discopop_tau).sigmoid() * -logsigmoid(h) + (logsigmoid(h / discopop_tau) - h).exp()


def sigmoid_norm(policy_B2: Tensor, reference_B2: Tensor, tokens_B2: Tensor, *, beta: float) -> Tensor:
    """-log σ(β (r_w/L_w - r_l/L_l)): DPO per token (Tülu 3, arXiv 2411.15124)."""
    ratio_B2 = _per_token(policy_B2 - reference_B2, tokens_B2)
    return -logsigmoid(beta * (ratio_B2[:, 0] - ratio_B2[:, 1]))


def simpo(policy_B2: Tensor, tokens_B2: Tensor, *, beta: float, simpo_gamma: float, label_smoothing: float) -> Tensor:
    """-log σ(β (S_w/L_w - S_l/L_l) - γ), without a reference (SimPO, arXiv 2405.14734, eq. 6), smoothed as DPO."""
    mean_B2 = _per_token(policy_B2, tokens_B2)
    return _smoothed(beta * (mean_B2[:, 0] - mean_B2[:, 1]) - simpo_gamma, label_smoothing)


def sft(policy_B2: Tensor, tokens_B2: Tensor) -> Tensor:
    """-S_w / L_w: likelihood of the chosen answer (with weight 0.05 beside sigmoid: VRPO, arXiv 2505.19223)."""
    return -_per_token(policy_B2, tokens_B2)[:, 0]


# ------------------------------------------------------------------------------------------ losses of a batch


def aot(policy_B2: Tensor, reference_B2: Tensor, weight_B2: Tensor, *, beta: float, label_smoothing: float) -> Tensor:
    """-log σ(β δ), δ the sorted policy margins S_w - S_l less the sorted reference margins (AOT, arXiv 2406.05882)."""
    real_B = weight_B2.prod(1) > 0
    policy, reference = policy_B2[real_B], reference_B2[real_B]
    margin, reference_margin = policy[:, 0] - policy[:, 1], reference[:, 0] - reference[:, 1]
    return _sorted_loss(real_B, margin, reference_margin, beta, label_smoothing)


def aot_unpaired(
    policy_B2: Tensor, reference_B2: Tensor, weight_B2: Tensor, *, beta: float, label_smoothing: float
) -> Tensor:
    """-log σ(β δ), δ the sorted chosen log-ratios less the sorted rejected ones (AOT, arXiv 2406.05882)."""
    real_B = weight_B2.prod(1) > 0
    w, l = (policy_B2 - reference_B2)[real_B].unbind(1)
    return _sorted_loss(real_B, w, l, beta, label_smoothing)


def _sorted_loss(real_B: Tensor, upper: Tensor, lower: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """The loss of the i-th smallest goes to the i-th real pair; only the batch's sum has a meaning."""
    delta = upper.sort().values - lower.sort().values
    loss = _smoothed(beta * delta, label_smoothing)
    return loss.new_zeros(len(real_B)).masked_scatter(real_B, loss)


# ------------------------------------------------------------------------------------------ losses of an answer


def kto(
    policy_B2: Tensor,
    reference_B2: Tensor,
    weight_B2: Tensor,
    *,
    beta: float,
    reference_point: Tensor | float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """λ_D (1 - σ(β (r - z))) for desirable answers, λ_U (1 - σ(β (z - r))) for undesirable ones (arXiv 2402.01306).

    z is ``reference_point``, detached (:func:`reference_point_of`). The chosen side holds desirable answers; either
    side may be absent.
    """
    w, l = (policy_B2 - reference_B2).unbind(1)
    desirable, undesirable = (-beta * (w - reference_point)).sigmoid(), (-beta * (reference_point - l)).sigmoid()
    return desirable_weight * weight_B2[:, 0] * desirable + undesirable_weight * weight_B2[:, 1] * undesirable


def apo_zero_unpaired(
    policy_B2: Tensor,
    reference_B2: Tensor,
    weight_B2: Tensor,
    *,
    beta: float,
    desirable_weight: float,
    undesirable_weight: float,
) -> Tensor:
    """``kto`` with z = 0, equal to ``apo_zero`` on pairs (APO, arXiv 2408.06266, eq. 7)."""
    weights = {"desirable_weight": desirable_weight, "undesirable_weight": undesirable_weight}
    return kto(policy_B2, reference_B2, weight_B2, beta=beta, reference_point=0.0, **weights)


def reference_point_of(policy_B2: Tensor, reference_B2: Tensor, weight_B2: Tensor) -> Tensor:
    """z of ``kto``: max(0, mean log-ratio) over the answers present, detached.

    KTO asks for scores of *mismatched* answers, each prompt with another record's answer
    (``losses.mismatched.mismatched``); they must come from the global batch. A policy far above the reference on its
    own answers is not penalised by it.
    """
    ratio_B2 = (policy_B2 - reference_B2).detach() * weight_B2
    return (ratio_B2.sum() / weight_B2.sum().clamp(min=1)).clamp(min=0)


def logsigmoid(x: Tensor) -> Tensor:
    """log σ(x)."""
    from torch.nn.functional import logsigmoid

    return logsigmoid(x)


def _smoothed(h: Tensor, label_smoothing: float) -> Tensor:
    return -(1 - label_smoothing) * logsigmoid(h) - label_smoothing * logsigmoid(-h)


def _per_token(score_B2: Tensor, tokens_B2: Tensor) -> Tensor:
    return score_B2 / tokens_B2.clamp(min=1)


# ------------------------------------------------------------------------------------------ by name


@dataclass(frozen=True)
class Loss:
    """A loss and what it needs. ``scope``: "pair"; "answer" (unpaired records will do); "batch" (couples pairs: gather
    the global batch's scores first). ``needs`` are names of keyword arguments of :func:`preference_loss`."""

    function: Callable[..., Tensor]
    scope: str = "pair"
    needs: frozenset[str] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "needs", frozenset(inspect.signature(self.function).parameters))

    @property
    def reference_free(self) -> bool:
        """True where reference scores are not read at all."""
        return "reference_B2" not in self.needs

    @property
    def needs_reference_point(self) -> bool:
        """True where the caller must bring KTO's reference point z, a scalar over the global batch."""
        return "reference_point" in self.needs


_PAIR = (sigmoid, robust, hinge, ipo, ipo_sum, exo_pair, nca_pair, bco_pair, sppo_hard, apo_zero, apo_down, discopop)
LOSSES: dict[str, Loss] = {
    **{function.__name__: Loss(function) for function in (*_PAIR, sigmoid_norm, simpo, sft)},
    **{function.__name__: Loss(function, scope="batch") for function in (aot, aot_unpaired)},
    **{function.__name__: Loss(function, scope="answer") for function in (kto, apo_zero_unpaired)},
}


def check_read(names: Sequence[str], parameters: Mapping[str, float]) -> None:
    """UserError for a parameter that is not at its default and that none of the losses reads."""
    for name, value in parameters.items():
        if value != DEFAULTS[name] and not any(name in LOSSES[loss].needs for loss in names):
            readers = ", ".join(loss for loss in LOSSES if name in LOSSES[loss].needs)
            raise UserError(f"--{name} {value} is not read by --loss_type {','.join(names)}; it is by {readers}")


DEFAULTS: dict[str, float] = {item.name: item.default for item in fields(LossParameters)}  # type: ignore[misc]
"""The defaults of the losses' own parameters."""


def check_names(names: str | Sequence[str]) -> tuple[str, ...]:
    """The loss names of ``"sigmoid,sft"`` or of a sequence. UserError for an unknown name or a mix without meaning."""
    listed = tuple(name.strip() for name in names.split(",")) if isinstance(names, str) else tuple(names)
    for name in listed:
        if name not in LOSSES:
            raise UserError(f"--loss_type {name or names!r}: unknown; choose among {', '.join(LOSSES)}")
    if len({LOSSES[name].scope == "answer" for name in listed if name != "sft"}) > 1:
        raise UserError(
            f"--loss_type {','.join(listed)} mixes a loss of single answers with one of pairs; keep one kind"
        )
    return listed


def check_loss(
    names: str | Sequence[str], *, weights: Sequence[float] | None = None, **parameters: float
) -> tuple[str, ...]:
    """``check_names`` and the ``parameters`` (those left out at their defaults) that go with them; needs no scores.
    UserError where they contradict."""
    listed, given = check_names(names), DEFAULTS | parameters
    label_smoothing, discopop_tau = given["label_smoothing"], given["discopop_tau"]
    if weights is not None and len(weights) != len(listed):
        raise UserError(f"--loss_weights has {len(weights)} numbers for {len(listed)} losses ({', '.join(listed)})")
    if "exo_pair" in listed and not 0 < label_smoothing < 1:
        raise UserError(f"--loss_type exo_pair needs 0 < --label_smoothing < 1 (say 1e-3), got {label_smoothing}")
    if "robust" in listed and not 0 <= label_smoothing < 0.5:
        raise UserError(f"--loss_type robust needs 0 <= --label_smoothing < 0.5, got {label_smoothing}")
    if "discopop" in listed and not 0 < discopop_tau <= 1:
        raise UserError(f"--loss_type discopop needs 0 < --discopop_tau <= 1, got {discopop_tau}")
    return listed


def preference_loss(
    names: str | Sequence[str],
    *,
    policy_B2: Tensor,
    reference_B2: Tensor | None,
    tokens_B2: Tensor,
    weight_B2: Tensor | None = None,
    weights: Sequence[float] | None = None,
    beta: float = 0.1,
    reference_point: Tensor | float | None = None,
    divergence: str = "reverse_kl",
    divergence_coefficient: float = 1.0,
    use_weighting: bool = False,
    **parameters: float,
) -> Tensor:
    """loss_B of one or several losses ("sigmoid,sft"), weighted (default 1 each) and summed; 0 where there is no pair.

    ``reference_B2`` None: reference-free, as if the reference gave every answer the same score. ``weight_B2`` is the
    batch's (default: all pairs real). ``reference_point`` is read by ``kto`` only; ``parameters`` are those of
    :class:`LossParameters`, the ones left out at their defaults. ``divergence`` and ``use_weighting``: see
    ``losses.divergence``. UserError where settings contradict.
    """
    listed = check_loss(names, weights=weights, **parameters)
    if reference_point is None and any(LOSSES[name].needs_reference_point for name in listed):
        raise ValueError("kto needs a reference point; see reference_point_of")
    weight_B2 = policy_B2.new_ones(policy_B2.shape) if weight_B2 is None else weight_B2
    known: Mapping[str, object] = {
        **DEFAULTS,
        **parameters,
        "policy_B2": policy_B2,
        "reference_B2": policy_B2.new_zeros(policy_B2.shape) if reference_B2 is None else reference_B2,
        "tokens_B2": tokens_B2,
        "weight_B2": weight_B2,
        "beta": beta,
        "reference_point": reference_point,
    }
    if divergence != "reverse_kl" and reference_B2 is not None:
        ratio_B2 = remapped(policy_B2 - reference_B2, divergence, divergence_coefficient)
        of_ratios = {**known, "policy_B2": ratio_B2, "reference_B2": policy_B2.new_zeros(policy_B2.shape)}
    else:
        of_ratios = dict(known)
    total_B = policy_B2.new_zeros(len(policy_B2))
    for name, factor in zip(listed, weights or [1.0] * len(listed), strict=True):
        loss = LOSSES[name]
        given = known if loss.reference_free else of_ratios
        loss_B = loss.function(**{key: given[key] for key in loss.needs})
        # where, not a product: what is computed for an absent record may be infinite
        total_B = total_B + factor * loss_B.where(_present(name, listed, weight_B2), loss_B.new_zeros(()))
    return total_B * wpo_weight(policy_B2, tokens_B2) if use_weighting else total_B


def loss_count(names: str | Sequence[str], weight_B2: Tensor) -> Tensor:
    """What the summed loss is divided by, after summing over ranks: answers for losses of answers, else pairs."""
    listed = check_names(names)
    if _supervised(listed):
        return weight_B2[:, 0].sum()
    return weight_B2.sum() if _of_answers(listed) else weight_B2.prod(1).sum()


def _supervised(listed: Sequence[str]) -> bool:
    """``sft`` alone reads chosen answers only, paired or not."""
    return set(listed) == {"sft"}


def _of_answers(listed: Sequence[str]) -> bool:
    return _supervised(listed) or any(LOSSES[name].scope == "answer" for name in listed)


def _present(name: str, listed: Sequence[str], weight_B2: Tensor) -> Tensor:
    """Which of the batch's B records a loss is taken over."""
    if not _of_answers(listed):
        return weight_B2.prod(1) > 0
    return weight_B2[:, 0] > 0 if name == "sft" else weight_B2.sum(1) > 0
