"""The commands of ``python -m data_pipeline``, one a module, each with ``run(args) -> exit code``."""
