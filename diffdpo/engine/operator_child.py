"""Compile one of DeepSpeed's operators, by its own builder: ``python -m diffdpo.engine.operator_child NAME``.

Started by `operator_build`, several at the same time: what one process compiles it compiles one after another.
"""

import sys

from diffdpo.engine.deepspeed import import_deepspeed
from diffdpo.engine.operator_cache import use_kept


def compile_operator(name: str) -> None:
    """Have the operator in the cache, whole."""
    import_deepspeed()
    use_kept([name])  # what is left of one that was cut short goes, else ninja takes it for the result
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    ALL_OPS[name].load(verbose=False)


if __name__ == "__main__":
    compile_operator(sys.argv[1])
