"""The model that comes with diffdpo, and the name that stands for it where none is given."""

from pathlib import Path

BUNDLED_MODEL = Path(__file__).parents[1] / "pretrained" / "arithmetic"


def model_or_bundled(name_or_path: str | None) -> str:
    """The name, or the bundled model's folder where there is none."""
    return name_or_path or str(BUNDLED_MODEL)
