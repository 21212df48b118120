"""A tokenizer's files beside a model, readable by transformers 4 and 5.

The published code of these families, and most servers, pin transformers 4, which does not know what 5 writes: the class
``TokenizersBackend``, a list under ``extra_special_tokens``, the template in a file of its own alone. So the files that
a tokenizer was read from are copied as they are, and what must be written is written as both read it.
"""

import json
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.hub import at_revision
from data_pipeline.tokenizer import read_tokenizer

CONFIG, TEMPLATE, NAMED_TEMPLATES = "tokenizer_config.json", "chat_template.jinja", "additional_chat_templates"
FILES = (
    *("tokenizer.json", CONFIG, "special_tokens_map.json", "added_tokens.json"),
    *("vocab.json", "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", TEMPLATE, "chat_template.json"),
)
"""What a tokenizer may be made of. Its code is copied besides, where its config names it."""
ONLY_OF_5 = ("backend", "is_local", "local_files_only")


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write the files of ``tokenizer``: those it was read from, where it is still what they say and both versions read
    them; else new ones."""
    folder.mkdir(parents=True, exist_ok=True)
    source = getattr(tokenizer, "read_from", None)
    kept = _files_of(source) if source and _is_as_read(tokenizer, source) else {}
    if CONFIG in kept and not _is_of_5_only(json.loads(kept[CONFIG].read_text())):
        for name, path in kept.items():
            if path.resolve() != (folder / name).resolve():
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(path, folder / name)
        if TEMPLATE not in kept:  # one of before would win over the one in the config
            (folder / TEMPLATE).unlink(missing_ok=True)
        else:
            _say_template_in_config(tokenizer, folder / CONFIG)
        return
    for name in ("vocab.json", "merges.txt"):  # transformers 5 writes tokenizer.json alone
        if name in kept and kept[name].resolve() != (folder / name).resolve():
            shutil.copyfile(kept[name], folder / name)
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    (folder / TEMPLATE).unlink(missing_ok=True)
    settings = json.loads((folder / CONFIG).read_text())
    (folder / CONFIG).write_text(json.dumps(_for_both(settings), indent=2, ensure_ascii=False) + "\n")


def _say_template_in_config(tokenizer: Any, file: Path) -> None:
    """A template in a file of its own is one that the first of the versions 4 do not see."""
    settings = json.loads(file.read_text())
    if settings.get("chat_template") or not (template := tokenizer.chat_template):
        return
    named = isinstance(template, dict)
    settings["chat_template"] = [{"name": name, "template": template[name]} for name in template] if named else template
    file.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n")


def _is_of_5_only(settings: dict[str, Any]) -> bool:
    return settings.get("tokenizer_class") == "TokenizersBackend" or isinstance(
        settings.get("extra_special_tokens"), list
    )


def _for_both(settings: dict[str, Any]) -> dict[str, Any]:
    """``tokenizer_config.json`` in the words that transformers 4 knows; 5 reads them too."""
    settings = {key: value for key, value in settings.items() if key not in ONLY_OF_5}
    if settings.get("tokenizer_class") == "TokenizersBackend":
        settings["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(settings.get("extra_special_tokens"), list):
        settings["additional_special_tokens"] = settings.pop("extra_special_tokens")
    return settings


def _is_as_read(tokenizer: Any, source: str) -> bool:
    """Whether the source says the same today. Which token is the mask, config.json says as well."""
    try:
        return _identity(tokenizer) == _identity(read_tokenizer(source))
    except DataError:  # it is gone
        return False


def _identity(tokenizer: Any) -> tuple:
    named = {key: str(value) for key, value in tokenizer.special_tokens_map.items() if key != "mask_token"}
    return tokenizer.get_vocab(), named, tokenizer.chat_template, tokenizer.padding_side, tokenizer.model_max_length


def _files_of(source: str) -> dict[str, Path]:
    """The files of a tokenizer in a folder or in the hub's cache, by name, with the code that its config names."""
    found = {name: path for name in FILES if (path := _file_of(source, name)) is not None}
    found |= {f"{NAMED_TEMPLATES}/{path.name}": path for path in Path(source, NAMED_TEMPLATES).glob("*.jinja")}
    settings = json.loads(found[CONFIG].read_text()) if CONFIG in found else {}
    for name in _code_named_by(settings):
        if (path := _file_of(source, name)) is not None:
            found[name] = path
    return found


def _code_named_by(settings: dict[str, Any]) -> set[str]:
    named = (settings.get("auto_map") or {}).get("AutoTokenizer") or []
    words = [word for word in ([named] if isinstance(named, str) else named) if word]
    return {f"{word.partition('.')[0]}.py" for word in words if "--" not in word}  # REPOSITORY--module.Class


def _file_of(source: str, name: str) -> Path | None:
    from transformers.utils import cached_file

    if Path(source).is_dir():
        path = Path(source) / name
        return path if path.is_file() else None
    plain, where = at_revision(source)
    with suppress(OSError, ValueError):
        found = cached_file(plain, name, _raise_exceptions_for_missing_entries=False, **where)
        return Path(found) if found else None
    return None
