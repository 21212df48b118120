"""``python -m diffdpo.tracking RUN_DIR``: send to MLflow what a run could not send while it ran."""

from pathlib import Path

from diffdpo.command import Parser, run


def main(argv: list[str]) -> int:
    """Ship the journal of a run."""
    parser = Parser(prog="python -m diffdpo.tracking", description=__doc__)
    parser.add_argument("run_dir", type=Path, help="the output folder of a run")
    run_dir = parser.parse_args(argv).run_dir
    from diffdpo.tracking.mlflow_run import ship_later

    lines = ship_later(run_dir)
    print(f"{run_dir}: all {lines} lines of metrics.jsonl are in MLflow")
    return 0


if __name__ == "__main__":
    run(main)
