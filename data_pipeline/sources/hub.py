"""Data sets by name: from the hub, or what the library `datasets` keeps of it on this machine.

`datasets` asks an absent hub several times, half a minute in all, before it looks into its own cache. So the hub is
asked once beforehand whether it has the name; where it does not answer, only the cache is looked into.
"""

from collections.abc import Iterator

from data_pipeline.errors import DataError

ANSWER_SECONDS = 10.0  # to connect, and to answer


def hub_items(name: str, config: str | None, split: str) -> Iterator[dict]:
    """The rows of a split. Raises DataError, in one line, when it cannot be had."""
    import datasets

    what = f"{name!r} is no file or folder here, and as a data set on the hub (split {split!r}) it cannot be loaded"
    silence = _why_silent(name, what)
    online = datasets.config.HF_HUB_OFFLINE
    try:
        datasets.config.HF_HUB_OFFLINE = online or bool(silence)
        data = datasets.load_dataset(name, config, split=split)
    except Exception as error:  # many kinds, of several libraries: all mean that the source cannot be had
        why = f"no copy is kept here, and the hub does not answer: {silence}" if silence else _in_a_line(error)
        raise DataError(f"{what}: {why}") from error
    finally:
        datasets.config.HF_HUB_OFFLINE = online
    return iter(data)


def _why_silent(name: str, what: str) -> str:
    """Why the hub gives no answer; '' when it has the data set. DataError when it says that it has not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError

    try:
        HfApi().dataset_info(name, timeout=ANSWER_SECONDS)
    except (RepositoryNotFoundError, HFValidationError) as error:
        raise DataError(f"{what}: the hub has no data set of this name, or does not show it to you") from error
    except Exception as error:  # no network, a proxy's refusal, a server in trouble, offline by the user's wish, ...
        return _in_a_line(error)
    return ""


def _in_a_line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
