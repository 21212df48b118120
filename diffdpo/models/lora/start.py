"""An adapter as it started, kept frozen beside the one that is trained: the reference of a run that goes on with one.

Both share the base model's weights. Which of them a forward uses is switched by name in the layers themselves: peft's
own ``set_adapter`` would also change what is trained, under an engine that has made its choice.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from copy import deepcopy

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import AuxiliaryTrainingWrapper
from torch import nn

TRAINED, START = "default", "start"


def keep_start(model: PeftModel) -> PeftModel:
    """Give `model` a second, frozen adapter with the numbers that its own has now, which stays the one in use."""
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    generator = torch.get_rng_state()
    model.add_adapter(START, deepcopy(model.peft_config[TRAINED]))
    torch.set_rng_state(generator)  # the numbers it was made with are not used
    own = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in own.items():
            parameter.requires_grad_(name in trained)
            if (twin := _twin(name)) is not None:
                parameter.data = own[twin].detach().clone()
                parameter.stays_whole = True  # type: ignore[attr-defined]  # on every process, as the trained one is
    _use(model, TRAINED)
    return model.eval()


@contextmanager
def at_start(model: nn.Module) -> Iterator[None]:
    """Inside, `model` computes with the adapter as it started."""
    _use(model, START)
    try:
        yield
    finally:
        _use(model, TRAINED)


def _use(model: nn.Module, name: str) -> None:
    for module in model.modules():
        if isinstance(module, BaseTunerLayer):
            module._active_adapter = [name]
        elif isinstance(module, AuxiliaryTrainingWrapper):
            module._active_adapter = name if isinstance(module._active_adapter, str) else [name]  # type: ignore[assignment]


def _twin(name: str) -> str | None:
    """The trained parameter that a frozen one is a copy of; None for any other."""
    found = re.subn(rf"\.{START}(?=\.|$)", f".{TRAINED}", name)
    return found[0] if found[1] else None
