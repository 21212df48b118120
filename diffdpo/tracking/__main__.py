"""``python -m diffdpo.tracking RUN_DIR``: send to MLflow what a run could not send while it ran."""

from pathlib import Path

from diffdpo.command import Parser, run
from diffdpo.settings.tracking import name_and_alias


def main(argv: list[str]) -> int:
    """Ship the journal of a run."""
    parser = Parser(prog="python -m diffdpo.tracking", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the output folder of a run")
    parser.add_argument(
        "--register_model", metavar="NAME", help="and make its final model a version of NAME (or NAME@ALIAS)"
    )
    args = parser.parse_args(argv)
    if args.register_model is not None:
        name_and_alias(args.register_model)
    from diffdpo.tracking.mlflow_run import ship_later

    lines = ship_later(args.run_dir)
    print(f"{args.run_dir}: all {lines} lines of metrics.jsonl are in MLflow")
    if args.register_model:
        from diffdpo.tracking.registry import register

        print(f"registered {register(args.run_dir, args.register_model)}")
    return 0


if __name__ == "__main__":
    run(main)
