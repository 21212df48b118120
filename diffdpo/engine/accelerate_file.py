"""What ``accelerate launch`` was configured for, held against the engine that flags chose: nothing is left unsaid.

Its configuration file starts processes, and names an engine and its options for programs that leave theirs to
Accelerate. Here flags name them: a file of another kind is refused, and options that differ are told
(``setup.accelerate_options``).
"""

import os
from collections.abc import Mapping

from diffdpo.engine.choice import DEEPSPEED, FSDP2
from diffdpo.errors import UserError

KINDS = {
    "ACCELERATE_USE_FSDP": (FSDP2, "FSDP", "add --engine fsdp2"),
    "ACCELERATE_USE_DEEPSPEED": (DEEPSPEED, "DeepSpeed", "add --ds_config FILE"),
}


def check_accelerate(kind: str, environment: Mapping[str, str] | None = None) -> None:
    """UserError where Accelerate's configuration names an engine and the flags another. ``environment``: the process's
    own where it is None."""
    environment = os.environ if environment is None else environment
    for variable, (theirs, called, flag) in KINDS.items():
        if environment.get(variable, "").lower() in ("1", "true") and kind != theirs:
            raise UserError(
                f"accelerate's configuration file asks for {called} and the flags for the {kind} engine; {flag}, or "
                "take a file of kind MULTI_GPU"
            )
