"""What a cell of a row says: a text, or turns in any of the ways the field writes them down.

Read as turns are lists of ``{"role", "content"}`` (OpenAI, TRL) and of ``{"from", "value"}`` (ShareGPT), one such
object on its own, ``{"messages": [...]}``, and the JSON or Python text of any of these, as tables hold it. Contents may
be lists of text parts. What cannot be read is refused: text that only looks like turns is never trained on as text.
"""

import ast
import json
import re
from collections import Counter
from collections.abc import Callable
from typing import Any, cast

from data_pipeline.records import KEPT_OF_A_TURN, Message, RecordError, Text

ROLES = {
    "human": "user",
    "prompter": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "bot": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "function_response": "tool",
    "observation": "tool",
} | {role: role for role in ("system", "developer", "user", "assistant", "tool", "function_call")}
"""Roles as they are written, in small letters, and as chat templates know them. Any other is left as it is."""
ROLE_KEYS, CONTENT_KEYS = ("role", "from"), ("content", "value")
MEDIA = ("image", "images", "image_url", "audio", "audios", "input_audio", "video", "videos", "file")
OF_THE_ROW = ("tools", "functions", "documents")  # what a template is given beside the turns, never in one
ANSWERED = ("chosen", "rejected", "completion", "answer", "response", "output", "solution")
SAID = (*CONTENT_KEYS, *KEPT_OF_A_TURN, *MEDIA)  # what makes a turn of an object with a role
PRINTED_NULLS = ("nan", "<NA>", "NaN", "NaT", "None", "null", "NULL")  # of answers the first two: others are words
EXCHANGE = {"input", "output"}
TEXT_PARTS = (None, "text", "input_text", "output_text")
# A list of turns printed by Python (numpy leaves the commas out), or of objects of a class of messages.
PRINTED = re.compile(
    r"\s*(array\(|list\()?\[?\s*\w*[Mm]essage\w*\("
    r"|(?=\s*(array\(|list\()?[\[({\s]*(OrderedDict\(|\{|\(['\"]))"
    r"(?=.*['\"](role|from)['\"]\s*[:,])(?=.*['\"](content|value)['\"]\s*[:,])",
    re.DOTALL,
)


def read_text(value: Any, name: str, unread: Counter | None = None) -> Text:
    """A string, or turns, from a cell in the column ``name``. ``unread`` counts what turns hold and nobody reads.
    Raises RecordError."""
    if isinstance(value, str):
        written = written_turns(value, name)
        return value if written is None else read_text(written, name, unread)
    if isinstance(value, dict):
        if key := _key(value, ROLE_KEYS):
            by_columns = isinstance(value[key], list | tuple)
            return tuple(_turn(turn, name, unread) for turn in (_by_turns(value, name) if by_columns else [value]))
        if isinstance(value.get("messages"), list):
            return read_text(value["messages"], name, unread)
    if isinstance(value, list | tuple):
        if value and all(isinstance(item, dict) and set(item) == EXCHANGE for item in value):
            return _exchanges(value, name, unread)
        return tuple(_turn(item, name, unread) for item in value)
    found = type(value).__name__
    raise RecordError("wrong_type", f"field {name!r} is {found}, not a string or a list of messages", malformed=True)


def _by_turns(columns: dict, name: str) -> list[dict]:
    """Turns that the library ``datasets`` keeps by columns: ``{"role": [...], "content": [...]}``."""
    lengths = {len(column) if isinstance(column, list | tuple) else -1 for column in columns.values()}
    if len(lengths) > 1:
        raise RecordError(
            "wrong_type", f"field {name!r} has turns by columns that are not equally long", malformed=True
        )
    return [dict(zip(columns, turn, strict=True)) for turn in zip(*columns.values(), strict=True)]


def _exchanges(value: list | tuple, name: str, unread: Counter | None) -> Text:
    """Capybara's turns: a list of ``{"input", "output"}``, of which the last output may be open."""
    said = [(role, item[key]) for item in value for role, key in (("user", "input"), ("assistant", "output"))]
    if said[-1][1] in ("", None):
        said.pop()
    return tuple(_turn({"role": role, "content": content}, name, unread) for role, content in said)


def written_turns(text: str, name: str) -> Any:
    """The turns that a text writes down, as JSON or as Python prints them; None for other text. RecordError where it
    looks like turns and cannot be read."""
    if text.lstrip()[:1] not in ("[", "{") and not PRINTED.match(text):
        return None
    data = parse_written(text)
    if _are_turns(data):
        return data
    if PRINTED.match(text) and (data is None or (isinstance(data, list) and ... in data)):  # numpy shortens with ...
        raise RecordError(
            "printed_list",
            f"field {name!r} is a list of messages as Python prints it, which cannot be read back: write it as JSON "
            "(json.dumps), or save the table as .jsonl or .parquet",
            malformed=True,
        )
    return None


def refuse_printed(text: str, name: str) -> None:
    """RecordError for a text that is what Python or pandas print of something else: an absent value, or a list or an
    object that is no turns. What is JSON as well may be an answer in JSON."""
    said, bare = text.strip(), "say which column it is, as in --columns " + f"{name}={name}, to take it as it is"
    if said in (PRINTED_NULLS[:2] if name in ANSWERED else PRINTED_NULLS):
        what = "as tables print what is absent: leave the cell empty"
    elif is_printed(said):
        what = "a list or an object as Python prints it: write out the text that it holds"
    else:
        return
    shown = said if len(said) < 40 else said[:37] + "..."
    raise RecordError("printed_value", f"field {name!r} is {shown}, {what}, or {bare}")


def is_printed(text: str) -> bool:
    """Whether a text is a list of strings, or an object, as Python or numpy prints it and JSON does not."""
    if not re.match(r"(array\()?\[\s*['\"]|\{\s*'", text) or text[-1] not in "])}":
        return False
    if text.startswith("array("):
        return True
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        value = parse_written(text)
        return isinstance(value, dict) or (isinstance(value, list) and all(isinstance(item, str) for item in value))
    return False


def parse_written(text: str) -> Any:
    """A list or an object from its JSON or from what Python prints of it; None for anything else."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        pass
    try:
        return ast.literal_eval(text.strip())
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return None


def _are_turns(data: Any) -> bool:
    items = [data] if isinstance(data, dict) else data
    if not isinstance(items, list | tuple) or not items:
        return False
    return all(isinstance(item, dict) and _key(item, ROLE_KEYS) and _key(item, CONTENT_KEYS) for item in items)


def _key(item: dict, names: tuple[str, ...]) -> str | None:
    return next((name for name in names if name in item), None)


def _turn(item: Any, name: str, unread: Counter | None) -> Message:
    if not isinstance(item, dict) or _key(item, ROLE_KEYS) is None or _key(item, SAID) is None:
        raise _no_turn(item, name)
    given = _one_of(item, ROLE_KEYS, name, role_of)
    if not isinstance(given, str) or not given.strip():
        raise _no_turn(item, name)
    kept = {key: _kept(key, item[key], name) for key in KEPT_OF_A_TURN if item.get(key)}
    role, said = role_of(given), _one_of(item, CONTENT_KEYS, name)
    if role == "function_call":  # ShareGPT: the call stands as JSON where the content would
        kept, content, role = _called(said, name), "", "assistant"
    else:
        content = _content(said, name, may_be_absent=bool(kept))
    _refuse_what_is_no_text(item, name)
    if unread is not None:
        known = {*KEPT_OF_A_TURN, *ROLE_KEYS, *CONTENT_KEYS}
        unread.update(
            f"{key} (of a turn)" for key, value in item.items() if key not in known and not _is_nothing(value)
        )
    return cast(Message, {"role": role, "content": content, **kept})


def _kept(key: str, value: Any, name: str) -> Any:
    """What a turn says beside its content, as templates read it: calls as lists of objects, the rest as text."""
    if key in ("tool_calls", "function_call"):
        value = parse_written(value) if isinstance(value, str) else value
        value = [value] if key == "tool_calls" and isinstance(value, dict) else value
        calls = value if key == "tool_calls" else [value]
        if isinstance(calls, list | tuple) and all(isinstance(call, dict) for call in calls):
            return without_nulls(value)
    elif isinstance(value, str):
        return value
    raise RecordError(
        "wrong_type", f"field {name!r} has a message whose {key!r} is {type(value).__name__}", malformed=True
    )


def role_of(name: Any) -> Any:
    """A role as chat templates know it."""
    return ROLES.get(name.strip().lower(), name) if isinstance(name, str) else name


def _one_of(item: dict, keys: tuple[str, ...], name: str, read: Callable[[Any], Any] = lambda value: value) -> Any:
    """What stands under the first of the keys that is there. RecordError where another says something else."""
    found = [read(item[key]) for key in keys if item.get(key) is not None]
    if any(other != found[0] for other in found[1:]):
        both = " and ".join(map(repr, keys))
        raise RecordError("wrong_type", f"field {name!r} has a message whose {both} differ", malformed=True)
    return found[0] if found else None


def _is_nothing(value: Any) -> bool:
    """True for what a table fills in; false and 0 do say something."""
    return value is None or (isinstance(value, str | list | tuple | dict) and not value)


def without_nulls(value: Any) -> Any:
    """Objects without their null fields: tables fill up with null what only some rows have."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list | tuple) else value


def _no_turn(item: Any, name: str) -> RecordError:
    found = f"the keys {', '.join(map(repr, item))}" if isinstance(item, dict) else type(item).__name__
    expected = "{'role': str, 'content': str}"
    if isinstance(item, str):
        found += "; of a list of texts take one, or name another column with --columns"
    return RecordError("wrong_type", f"field {name!r} has a message that is not {expected}: {found}", malformed=True)


def _content(value: Any, name: str, *, may_be_absent: bool) -> str:
    if isinstance(value, str):
        return value
    if value is None and may_be_absent:  # a turn that calls a tool says nothing besides
        return ""
    if isinstance(value, list | tuple):
        return "".join(_part(part, name) for part in value)
    found = "null" if value is None else type(value).__name__
    raise RecordError("wrong_type", f"field {name!r} has a message whose content is {found}, not text", malformed=True)


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    media = next((key for key in MEDIA if part.get(key)), None) if isinstance(part, dict) else None
    if isinstance(part, dict) and not media and part.get("type") in TEXT_PARTS and isinstance(part.get("text"), str):
        return part["text"]
    found = repr(media or part.get("type")) if isinstance(part, dict) else type(part).__name__
    raise RecordError("not_text", f"field {name!r} has a message with a part of type {found}; only text is read")


def _refuse_what_is_no_text(item: dict, name: str) -> None:
    if media := next((key for key in MEDIA if item.get(key)), None):
        raise RecordError("not_text", f"field {name!r} has a message with {media!r}; only text is read")
    if misplaced := next((key for key in OF_THE_ROW if item.get(key)), None):
        raise RecordError(
            "unknown_column",
            f"field {name!r} has a message with {misplaced!r}, which chat templates read beside the messages: give the "
            f"row a column {misplaced!r}",
            malformed=True,
        )


def _called(value: Any, name: str) -> dict:
    call = parse_written(value) if isinstance(value, str) else value
    if not isinstance(call, dict) or "name" not in call:
        raise RecordError(
            "wrong_type", f"field {name!r} has a function_call that is no JSON with a name", malformed=True
        )
    return {"tool_calls": [{"type": "function", "function": call}]}
