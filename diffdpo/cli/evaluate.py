"""Models on held-out pairs and tasks, with error bars, as a table and JSON; several models are compared item by item.

    python launch/evaluate.py --model_name_or_path DIR --ref_model_name_or_path DIR --pairs pairs.jsonl
    python launch/evaluate.py --model_name_or_path BEFORE AFTER --task gsm8k@test.jsonl --sampler_grid steps=64,128
    torchrun --nproc_per_node 4 launch/evaluate.py --model_name_or_path outputs/RUN --task arithmetic --output FILE.json

With --output a broken-off evaluation goes on where it stopped. docs/evaluation.md says what the figures mean.
"""

from pathlib import Path

from diffdpo.cli.flags import parse_config
from diffdpo.config import EvaluateConfig


def main(argv: list[str]) -> None:
    """Evaluate every model on every task."""
    config = parse_config(EvaluateConfig, argv, __doc__ or "")
    from diffdpo.engine.world import init_distributed, shutdown_distributed
    from diffdpo.evaluation.report import print_report
    from diffdpo.training.evaluation import evaluate

    world = init_distributed()
    try:
        report = evaluate(config, world)
        if world.is_main:
            print_report(report)
            if config.output:
                print(f"files   {config.output}, and every item in {Path(config.output).with_suffix('.items')}")
    finally:
        shutdown_distributed()
