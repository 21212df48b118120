"""Data sets by name: from the hub, or what the library `datasets` keeps of it on this machine."""

from collections.abc import Iterable

from data_pipeline.errors import DataError
from data_pipeline.hub import NotOnHub, in_a_line, why_silent


def hub_items(name: str, config: str | None, split: str) -> Iterable[dict]:
    """The rows of a split. Raises DataError, in one line, when it cannot be had."""
    import datasets

    what = f"{name!r} is no file or folder here, and as a data set on the hub (split {split!r}) it cannot be loaded"
    try:
        silence = why_silent(name, "dataset")
    except NotOnHub as error:
        raise DataError(f"{what}: the hub has no data set of this name, or does not show it to you") from error
    online = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = online or bool(silence)
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # many kinds, of several libraries: all mean that the source cannot be had
        why = f"no copy is kept here, and the hub does not answer: {silence}" if silence else in_a_line(error)
        raise DataError(f"{what}: {why}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = online
    return data
