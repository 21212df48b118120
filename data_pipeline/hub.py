"""The Hugging Face hub, asked once and briefly whether it has a name.

The libraries that read from it ask an absent hub several times, up to a minute in all, before they look into what they
keep on this machine. So the hub is asked beforehand; where it does not answer, only that is looked into.
"""

from functools import cache
from pathlib import Path
from typing import Any

from data_pipeline.addresses import hidden
from data_pipeline.errors import DataError

ANSWER_SECONDS = 10.0  # to connect, and to answer


def pinned(name: str | None, revision: str | None) -> str | None:
    """A model of the hub at a branch, tag or commit by one name, NAME@REVISION. (Names of the hub have no @.)"""
    return f"{name}@{revision}" if name and revision else name


def split_revision(name_or_path: str) -> tuple[str, str | None]:
    """(name, revision); None where none is named, and for a folder, whatever its name."""
    name, at, revision = name_or_path.rpartition("@")
    if not at or not name or not revision or Path(name_or_path).exists():
        return name_or_path, None
    return name, revision


class NotOnHub(LookupError):
    """The hub says that it has no such name. (Of a private one it says the same to strangers.)"""


def why_silent(name: str, kind: str, revision: str | None = None) -> str:
    """Why the hub gives no answer about a ``model`` or ``dataset``; '' when it has it. NotOnHub when it has not."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError

    ask = HfApi().dataset_info if kind == "dataset" else HfApi().model_info
    try:
        ask(name, revision=revision, timeout=ANSWER_SECONDS)
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError) as error:
        raise NotOnHub(name) from error
    except Exception as error:  # no network, a proxy's refusal, a server in trouble, offline by the user's wish, ...
        return in_a_line(error)
    return ""


def only_kept(name_or_path: str) -> bool:
    """Whether a model (or a tokenizer) is to be read from this machine alone: a folder, or a name of the hub while
    that does not answer. It is what ``local_files_only`` should be. DataError when it can be had from neither."""
    if "://" in name_or_path:
        raise DataError(f"no model at {hidden(name_or_path)!r}: an address is none; give a folder or a name on the hub")
    name, revision = split_revision(name_or_path)
    if name and Path(name).is_dir():
        return True
    if name and Path(name).exists():
        raise DataError(f"no model at {name!r}: it is a file; give the folder of a model")
    if not name or name.startswith(("/", ".", "~")) or name.count("/") > 1:
        raise DataError(f"no model at {name!r}: there is no such folder")
    return _only_kept_of_hub(name, revision)


def at_revision(name_or_path: str) -> tuple[str, dict[str, Any]]:
    """(name, the arguments with which transformers reads a model or tokenizer of it). DataError when it is nowhere."""
    name, revision = split_revision(name_or_path)
    return name, {"local_files_only": only_kept(name_or_path), "revision": revision or "main"}


@cache  # config, tokenizer and weights are fetched one after the other
def _only_kept_of_hub(name: str, revision: str | None) -> bool:
    from huggingface_hub.errors import RevisionNotFoundError

    what, mend = f"no model at {name!r}: it is no folder here", "give a folder or a model's name on the hub"
    try:
        silence = why_silent(name, "model", revision)
    except NotOnHub as error:
        if revision and isinstance(error.__cause__, RevisionNotFoundError):
            raise DataError(
                f"no revision {revision!r} of {name!r} on the hub; give a branch, a tag or a commit"
            ) from error
        raise DataError(f"{what}, and the hub has no such model, or does not show it to you; {mend}") from error
    if silence and not _is_kept(name, revision):
        raise DataError(f"{what}, no copy of it is kept, and the hub does not answer ({silence}); {mend}, or connect")
    return bool(silence)


def _is_kept(name: str, revision: str | None) -> bool:
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    try:
        snapshot_download(name, revision=revision, local_files_only=True, allow_patterns=[])
    except LocalEntryNotFoundError:
        return False
    return True


def in_a_line(error: Exception) -> str:
    """An error's text on one line, its beginning if it is long."""
    return " ".join(str(error).split())[:300] or type(error).__name__
