"""DeepSpeed's Adam on the host counts in a way of its own, which a checkpoint does not hold.

Its C++ object (csrc/adam) keeps beta^t as a running product in float, step by step. A new object that is told a later
step starts from a power instead, which differs in the last digits. So after a load its steps are told to it again, from
the first one on, with weights of no consequence.
"""

from typing import Any

import torch


def wind_up(optimizer: Any) -> None:
    """Bring the running products of an optimizer, whose state has just been loaded, to where they were. Nothing is done
    for an optimizer that keeps none."""
    update = _host_update(optimizer)
    steps = max((int(state["step"]) for state in optimizer.state.values() if "step" in state), default=0)
    if update is not None:
        beta1, beta2 = optimizer.param_groups[0]["betas"]
        for step in range(1, steps + 1):
            update(step, beta1, beta2)


def _host_update(optimizer: Any) -> Any:
    """``update(step, beta1, beta2)`` on weights of its own; None where the optimizer keeps no product."""
    nothing = [torch.zeros(1) for _ in range(4)]
    if hasattr(optimizer, "ds_opt_adam"):  # DeepSpeedCPUAdam, an object of its own for each
        return lambda step, beta1, beta2: optimizer.ds_opt_adam.adam_update(
            optimizer.opt_id, step, 0.0, beta1, beta2, 1.0, 0.0, True, *nothing
        )
    if hasattr(optimizer, "multi_tensor_adam") and not torch.cuda.is_available():  # FusedAdam; the GPU's keeps none
        g, p, m, v = ([tensor] for tensor in nothing)
        return lambda step, beta1, beta2: optimizer.multi_tensor_adam(
            2048 * 32, torch.zeros(1, dtype=torch.int32), [g, p, m, v], 0.0, beta1, beta2, 1.0, step,
            optimizer.adam_w_mode, 1, 0.0,
        )  # fmt: skip
    return None
