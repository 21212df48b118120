"""lm-evaluation-harness with the model ``diffdpo``: its own flags, after `diffdpo lm-eval`.

    diffdpo lm-eval run --model diffdpo --model_args pretrained=DIR,num_mc_samples=16 --tasks arc_easy --batch_size 8

The harness is not installed with diffdpo: pip install 'diffdpo[lm_eval]'. docs/evaluation.md says what the model class
does.
"""

import sys

from diffdpo.errors import UserError


def main(argv: list[str]) -> int | None:
    """Register the model and hand the line to the harness."""
    if argv[:1] in ([], ["--help_all"]):
        print(__doc__)
        return 0
    try:
        from lm_eval.__main__ import cli_evaluate
    except ImportError as error:
        raise UserError(
            f"lm-evaluation-harness is not here ({error}); install it with: pip install 'diffdpo[lm_eval]'"
        ) from None
    import diffdpo.evaluation.lm_eval  # noqa: F401  registers the model
    from diffdpo.engine.world import shutdown_distributed

    sys.argv = ["lm-eval", *argv]
    try:
        cli_evaluate()
    finally:
        shutdown_distributed()
    return 0
