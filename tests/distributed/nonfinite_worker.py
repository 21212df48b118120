"""Three steps of a small module, the second with a gradient that is not a number; prints what became of the weights.

torchrun ... nonfinite_worker.py plain '{}' 0
torchrun ... nonfinite_worker.py deepspeed '{"stage": 2}' 1     (ZeRO section, bf16)
"""

import json
import sys

import torch

from diffdpo.engine.choice import EngineChoice, deepspeed_choice
from diffdpo.engine.deepspeed import DeepSpeedEngine
from diffdpo.engine.optimizer import OptimizerOptions
from diffdpo.engine.plain import PlainEngine
from diffdpo.engine.world import init_distributed

OPTIONS = OptimizerOptions(learning_rate=1e-2, max_grad_norm=1.0)
NAN_STEP = 1


def main() -> None:
    kind, zero, bf16 = sys.argv[1], json.loads(sys.argv[2]), sys.argv[3] == "1"
    world = init_distributed()
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.Tanh(), torch.nn.Linear(16, 1))
    if kind == "plain":
        engine = PlainEngine(module, world, OPTIONS, choice=EngineChoice(processes=world.size))
    else:
        config = {"zero_optimization": zero, "optimizer": {"params": {"torch_adam": True}}}
        config["zero_force_ds_cpu_optimizer"] = False
        sizes = {"micro_batch_size": 1, "accumulation_steps": 1, "processes": world.size, "bf16": bf16}
        engine = DeepSpeedEngine(module, world, OPTIONS, choice=deepspeed_choice(config, OPTIONS, **sizes))
    weights, norms = [], []
    for step in range(3):
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(10 * step + world.rank))
        loss = engine(x.bfloat16() if bf16 else x).float().pow(2).mean()
        # of one rank alone: all must do as it does
        broken = step == NAN_STEP and world.rank == world.size - 1
        engine.backward(loss * (float("nan") if broken else 1.0), last=True)
        norms.append(engine.step(1e-2))
        state = engine.full_state_dict()
        if world.is_main:
            weights.append(torch.cat([value.float().flatten() for value in state.values()]).tolist())
    if world.is_main:
        print("RESULT " + json.dumps({"weights": weights, "norms": norms}))


if __name__ == "__main__":
    main()
