"""The splits of a folder of data files, told as the library `datasets` tells them.

From the ``configs`` of its README.md where it lists any, else from the names of files and folders.
"""

from glob import escape
from pathlib import Path

import yaml

from data_pipeline.errors import DataError
from data_pipeline.hub import in_a_line


def folder_splits(folder: Path, config: str | None) -> dict[str, list[Path]]:
    """{split: its files}. Files whose names tell of no split are ``train`` where none does. Raises DataError."""
    import datasets

    if _lists_configs(folder / "README.md"):
        name, options = str(folder), {"name": config}
    elif config is None:
        name, options = "json", {"data_dir": escape(str(folder))}  # looks at names only, whatever the type of the files
    else:
        raise DataError(f"{folder} has no configuration {config!r}: it has no README.md that lists any; leave it out")
    try:
        found = datasets.load_dataset_builder(name, **options).config.data_files
    except Exception as error:  # of many kinds: a configuration that is not there or not named, patterns without files
        raise DataError(f"the splits of {folder} cannot be told: {in_a_line(error)}") from error
    return {str(split): [Path(file) for file in files] for split, files in found.items()}


def _lists_configs(readme: Path) -> bool:
    """Whether the YAML between the first two lines ``---`` has a list ``configs``."""
    text = readme.read_text(errors="replace") if readme.is_file() else ""
    if not text.startswith("---\n"):
        return False
    try:
        head = yaml.safe_load(text[4:].split("\n---")[0])
    except yaml.YAMLError:
        return False
    return isinstance(head, dict) and isinstance(head.get("configs"), list)
