"""What the columns of a row are: known by name, or told with ``--columns prompt=question,system=persona``.

A row's columns are read once, here: nulls are absent ones, what a table writes down as text is a list again, and the
pairs of other programs get the names ``chosen`` and ``rejected``. A prompt is what a column of a known name holds; two
columns that could both be it are refused, for the one that is left out might be what the answers answer.
"""

import json
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from data_pipeline.errors import DataError
from data_pipeline.records import GRADES, LABELS, Message, RecordError, Text, assistant_turn, missing_field, user_turn
from data_pipeline.sources.messages import parse_written, read_text, refuse_printed, without_nulls

PAIR = ("chosen", "rejected")
ASKED = ("prompt", "question", "query", "instruction", "input", "problem")  # texts, or turns; the first that is there
TURNS = ("messages", "conversations", "conversation")  # turns: a whole conversation, or those before an answer
SYSTEM = ("system", "system_prompt", "system_message", "system_instruction", "system_content", "sys", "sys_prompt")
AROUND = (  # part of a prompt for some, a note for others: never guessed
    *("context", "contexts", "passage", "passages", "document", "documents", "article", "background", "persona"),
    *("input_text", "inputs", "user_input", "options", "choices"),
    *("chat_history", "conversation_history", "dialogue_history", "message_history", "dialogue", "dialog"),
    *("previous_messages", "previous_turns", "prefix", "prefill", "initial_reason_steps"),
)
PROMPTS = (*ASKED, *TURNS, *SYSTEM, "history", *AROUND)
ANSWERS = ("completion", "answer", "response", "output")
LISTS = ("candidates", "answers", "responses", "completions", "solutions")
FLAGS = (*GRADES, "labels")
TEXTS = ("text", "solution", "answer", "completion", "content")
REFERENCES = ("ground_truth", "reference", "reference_answer")
META_COLUMNS = ("source", "score_chosen", "score_rejected", "prompt_id", *REFERENCES, "final_answer")
FOR_TEMPLATE = ("tools", "functions", "chat_template_kwargs", "template_kwargs")
MEDIA_COLUMNS = (
    *(
        name + ending
        for kind in ("image", "img", "picture", "photo", "audio", "video")
        for name in (kind, f"{kind}s")
        for ending in (
            "",
            *(f"_{what}" for what in ("path", "paths", "url", "urls", "file", "files", "bytes", "base64")),
        )
    ),
    "pixel_values",
)
THOUGHTS = re.compile(
    r"reasoning_content|thinking|(chosen|rejected)_(reasoning(_content)?|thinking|thoughts?)"
    r"|(reasoning(_content)?|thinking|thoughts?)_(chosen|rejected)",
    re.IGNORECASE,
)
"""Columns of what was thought before an answer; turns of messages hold it beside their content."""
WRITTEN = (*LISTS, *FLAGS, *TURNS, *FOR_TEMPLATE, *MEDIA_COLUMNS, "history", "meta")  # a table holds them as JSON
OTHER_PAIRS = (("preferred_output", "non_preferred_output"), ("chosen_response", "rejected_response"))
TARGETS = (*PAIR, *PROMPTS, *ANSWERS, "label", *LISTS, *FLAGS, *FOR_TEMPLATE, "id", "meta", *META_COLUMNS)
NAMED = frozenset((*TARGETS, "kto_tag", "rejected_response")) - {"id", "meta", *META_COLUMNS}
"""Names that are also read in capitals, with blanks and hyphens: ``Prompt``, ``System Prompt``, ``systemPrompt``."""
RESERVED = frozenset(
    (
        *("conversation", "messages", "tools", "chat_template", "add_generation_prompt", "continue_final_message"),
        *("tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"),
        *("return_assistant_tokens_mask", "tokenizer_kwargs"),
    )
)
"""Arguments of a tokenizer's ``apply_chat_template`` that are this package's to give."""
NEEDED = (*PAIR, *ASKED, *TURNS, *ANSWERS, "label", *LISTS, *FLAGS)  # where they are mapped, every row has them

Columns = tuple[tuple[str, tuple[str, ...]], ...]
"""What a mapping says: (our name, the columns that make it up), ..."""


def parse_columns(given: str | Mapping[str, str] | Columns | None) -> Columns:
    """``prompt=question,system=persona`` (or a dict of it) → a mapping. ``prompt=context+question`` joins texts with an
    empty line. DataError, naming what is allowed, for anything else."""
    if not given:
        return ()
    if isinstance(given, tuple):
        return given
    pairs = given.items() if isinstance(given, Mapping) else [part.partition("=")[::2] for part in given.split(",")]
    columns = tuple((ours.strip(), tuple(name.strip() for name in theirs.split("+"))) for ours, theirs in pairs)
    for ours, theirs in columns:
        if not ours or not all(theirs):
            raise DataError(f"--columns {given!r}: give pairs such as prompt=question,chosen=good,rejected=bad")
        if ours not in TARGETS:
            raise DataError(f"--columns has {ours!r}; allowed: {', '.join(dict.fromkeys(TARGETS))}")
    if len(dict(columns)) < len(columns):
        raise DataError(
            f"--columns {given!r} names something twice; join columns with +, as in prompt=context+question"
        )
    return columns


class Fields(dict):
    """A row under our names. ``read``: those that were used; ``mapped``: those that the user named; ``unread`` counts
    what is there and was not used; ``notes`` what was done that the user should know."""

    def __init__(self, row: Mapping[str, Any], columns: Columns = ()):
        present = {name: value for name, value in row.items() if not _is_absent(value)}
        self.unlabelled = [name for name in LABELS if name in row and name not in present]
        self.read: set[str] = set()
        self.unread: Counter[str] = Counter()
        self.notes: Counter[str] = Counter()
        self.mapped = frozenset(ours for ours, _ in columns)
        self.format = "auto"  # as the user named it
        self.written: dict[str, str] = {}  # our name for a column → the one it has
        super().__init__(self._known_names(self._renamed(present, columns)))
        for name in self:
            self[name] = _unwritten(name, self[name])
        self._take_media()
        self._unpack_input()
        self._name_pair()

    def _renamed(self, row: dict, columns: Columns) -> dict:
        used = {name for _, theirs in columns for name in theirs}
        mapped = {ours: value for ours, theirs in columns if (value := _joined(row, ours, theirs)) is not None}
        self.unread.update(name for name in row if name in self.mapped and name not in used)
        return {name: value for name, value in row.items() if name not in used | self.mapped} | mapped

    def _known_names(self, row: dict) -> dict:
        """The row with small letters and underscores in the names that are known then, and say nothing twice."""
        plain = {name: _plain(name) for name in row if isinstance(name, str)}
        count = Counter(plain.values())
        known = {name: ours for name, ours in plain.items() if ours in NAMED - self.mapped and count[ours] == 1}
        self.written = {ours: name for name, ours in known.items()}
        return {known.get(name, name): value for name, value in row.items()}

    def _take_media(self) -> None:
        names = (name for name in self if name in MEDIA_COLUMNS or _is_media(self[name]))
        if name := next((name for name in names if _holds_something(self[name])), None):
            raise RecordError("not_text", f"the row has {name!r}; only text is read")

    def _unpack_input(self) -> None:
        """OpenAI's preference rows: ``input`` holds the messages and the tools."""
        if isinstance(value := self.get("input"), dict) and "messages" in value:
            self.pop("input")
            self.update({name: part for name, part in value.items() if name not in self and not _is_absent(part)})

    def _name_pair(self) -> None:
        """The pairs of other programs under our names: OpenAI's, and ms-swift's, whose chosen answer is the response,
        or the last turn of the messages."""
        for theirs in OTHER_PAIRS:
            if set(theirs) <= set(self) and not set(PAIR) & set(self):
                for ours, name in zip(PAIR, theirs, strict=True):
                    self[ours] = self.pop(name)
        if {"messages", "rejected_messages"} <= set(self) and not set(PAIR) & set(self):
            self["chosen"], self["rejected"] = self.pop("messages"), self.pop("rejected_messages")
        if "rejected_response" not in self or set(PAIR) & set(self):
            return
        if "response" in self:
            self["chosen"] = self.pop("response")
        elif "messages" in self and not set(ASKED) & set(self):
            turns = read_text(self.pop("messages"), "messages", self.unread)
            if isinstance(turns, str) or len(turns) < 2 or turns[-1]["role"] != "assistant":
                raise RecordError("not_one_answer", "'messages' does not end with the answer that was chosen")
            self["prompt"], self["chosen"] = list(turns[:-1]), list(turns[-1:])
            if isinstance(text := read_text(self["rejected_response"], "rejected_response"), str):
                self["rejected_response"] = assistant_turn(text)
        else:
            raise absent("response", self)
        self["rejected"] = self.pop("rejected_response")

    def text(self, name: str) -> Text:
        """The text or the turns of a column, which counts as read. Raises RecordError; an absent one is missing."""
        if name not in self:
            raise absent(name, self)
        self.read.add(name)
        text = read_text(self[name], name, self.unread)
        if isinstance(text, str) and name not in self.mapped:
            refuse_printed(text, name)
        return text

    def left(self) -> list[str]:
        """The columns that nobody has read, and that say something."""
        known = self.read | {"id", "meta", *META_COLUMNS}
        return [name for name, value in self.items() if name not in known and value not in ("", [], {}, ())]

    def refuse_thoughts(self) -> None:
        """RecordError for a column of thoughts, without which an answer is another one."""
        if name := next((name for name in self.left() if THOUGHTS.fullmatch(name)), None):
            raise RecordError(
                "unknown_column",
                f"{name!r} may be a part of the answer: write the answer as a turn, {{'role': 'assistant', "
                "'reasoning_content': ..., 'content': ...}, or take the column out of the data",
                malformed=True,
            )

    def found(self) -> list[str]:
        """The columns as the user wrote them."""
        return [self.written.get(name, name) for name in self]

    def finish(self) -> None:
        """Count the columns that nobody has read."""
        self.unread.update(self.written.get(name, name) for name in self.left())


def absent(name: str, row: Mapping[str, Any]) -> RecordError:
    """The error for a column that is not there, naming what is and how to say that another one holds it."""
    error = missing_field(name, dict.fromkeys(row.found()) if isinstance(row, Fields) else dict(row))
    if not row:
        return error
    return RecordError(error.kind, f"{error}; if another column holds it, --columns {name}=COLUMN", malformed=True)


def _plain(name: str) -> str:
    """``System Prompt``, ``system-prompt`` and ``systemPrompt`` → ``system_prompt``."""
    return re.sub(r"[\s-]+", "_", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name.strip())).lower()


def _is_absent(value: Any) -> bool:
    return value is None or (isinstance(value, float) and value != value)  # pandas writes NaN where a cell is empty


def _holds_something(value: Any) -> bool:
    parts = value.values() if isinstance(value, dict) else value
    return any(map(_holds_something, parts)) if isinstance(value, list | tuple | dict) else bool(value)


def _is_media(value: Any) -> bool:
    """Whether a cell is a file of the library ``datasets``: an image, a sound or a video under any name."""
    return isinstance(value, dict) and set(value) == {"bytes", "path"}


def _joined(row: dict, ours: str, theirs: tuple[str, ...]) -> Any:
    missing = [name for name in theirs if name not in row]
    if missing and (ours in NEEDED or len(missing) < len(theirs)):
        raise missing_field(missing[0], row)
    if missing or len(theirs) == 1:
        return None if missing else row[theirs[0]]
    if any(not isinstance(row[name], str) for name in theirs):
        raise RecordError("wrong_type", f"--columns joins {', '.join(theirs)}: all must be text", malformed=True)
    return "\n\n".join(row[name] for name in theirs)


def _unwritten(name: str, value: Any) -> Any:
    """A list or an object that a table holds as text. Other text stays, also where that happens to be JSON."""
    if not isinstance(value, str) or value.lstrip()[:1] not in ("[", "{"):
        return value
    if name in WRITTEN:
        data = parse_written(value)
        return value if data is None else data
    if value.lstrip()[0] == "{" and "is_correct" in value and is_graded(data := parse_written(value)):
        return data
    return value


def is_graded(value: Any) -> bool:
    """True for the cell of a model's column: a solution and whether it is right."""
    return isinstance(value, dict) and {"solution", "is_correct"} <= set(value)


# ---------------------------------------------------------------------------------------------------- the prompt


def read_prompt(fields: Fields, said: Iterable[Text] = ()) -> Text | None:
    """The prompt of a row; None where no column holds one. ``said``: what the answers' columns say, for a column that
    only repeats some of that. Raises RecordError where two columns could be the prompt."""
    prompt = _asked(fields)
    if prompt is not None:
        refuse_rivals(fields, [prompt, *said])
    return prompt


def _asked(fields: Fields) -> Text | None:
    name = next((name for name in (*ASKED, *TURNS) if name in fields.mapped), None)
    name = name or next((name for name in (*ASKED, *TURNS) if fields.get(name)), None)
    if name is None:
        return fields.text("prompt") if "prompt" in fields else None  # an empty one, to be counted as such
    text = fields.text(name)
    if name == "instruction" and fields.get("input"):  # Alpaca's layout
        return _both(text, fields.text("input"))
    return text if name in ASKED else _without_answer(text, fields)


def _without_answer(turns: Text, fields: Fields) -> Text:
    """A conversation that stands beside its answers, without the answer that it may end with."""
    if isinstance(turns, str) or not turns or turns[-1]["role"] != "assistant" or not turns[-1]["content"]:
        return turns
    answers = [fields[name] for name in (*PAIR, *ANSWERS) if isinstance(fields.get(name), str | list | tuple | dict)]
    said = [parts_of(read_text(answer, "chosen"))[-1:] for answer in answers]
    if [turns[-1]["content"]] in said:
        return turns[:-1]
    raise RecordError(
        "ambiguous_prompt",
        "the turns end with an answer that is none of the row's answers: leave it out, or, if the answers go on with "
        "it, name the column with --columns prompt=COLUMN",
        malformed=True,
    )


def _both(instruction: Text, given: Text) -> Text:
    if isinstance(instruction, str) and isinstance(given, str):
        return f"{instruction}\n\n{given}"
    raise RecordError("wrong_type", "'instruction' and 'input' are not both text", malformed=True)


def refuse_rivals(fields: Fields, known: Iterable[Text]) -> None:
    """A column that could be (part of) the prompt as well must say nothing that is not ``known`` already, unless the
    user has said what the prompt is, or that the answers begin with it. Raises RecordError."""
    if "prompt" in fields.mapped or fields.format == "implicit":
        return
    parts = [part.strip() for text in known for part in parts_of(text)]
    for name in (*ASKED, *TURNS, *AROUND):
        if name in fields.read or not fields.get(name):
            continue
        rival = _what_is_said(fields[name], name)
        if not all(_is_said(part.strip(), parts) for part in parts_of(rival)):
            used = next((column for column in (*ASKED, *TURNS) if column in fields.read), "chosen")
            raise RecordError(
                "ambiguous_prompt",
                f"{used!r} and {name!r} can both hold (a part of) the prompt: say which with --columns prompt=COLUMN, "
                "join texts with --columns prompt=COLUMN+COLUMN, or name earlier turns with history=COLUMN",
                malformed=True,
            )
        fields.read.add(name)


def _what_is_said(value: Any, name: str) -> Text:
    """What a column of any type says: turns where it holds some."""
    if name in AROUND and isinstance(value, list | tuple | dict):
        texts = [value] if isinstance(value, dict) else value
        if not all(isinstance(item, dict) and "role" in item for item in texts):
            return tuple(
                {"role": "", "content": item if isinstance(item, str) else json.dumps(item, default=str)}
                for item in texts
            )
    return read_text(value, name) if isinstance(value, str | list | tuple | dict) else str(value)


def _is_said(part: str, parts: list[str]) -> bool:
    """A few letters stand in any text; they must be all that one part says."""
    return part in parts or (len(part) >= 8 and any(part in known for known in parts))


def parts_of(text: Text) -> list[str]:
    """A text, or the contents of its turns."""
    return [text] if isinstance(text, str) else [turn["content"] for turn in text]


def with_turns_before(prompt: Text, fields: Fields) -> Text:
    """The prompt behind the system's turn and the history of its row; a string becomes a turn when there are any."""
    before = (*_system(fields), *_history(fields))
    turns = user_turn(prompt) if isinstance(prompt, str) else prompt
    if before and before[0]["role"] == "system" and turns and turns[0]["role"] == "system":
        if turns[0] != before[0]:
            raise RecordError(
                "ambiguous_prompt",
                "the row has a system column and the prompt a system turn, and they differ",
                malformed=True,
            )
        before = before[1:]
    return (*before, *turns) if before else prompt


def _system(fields: Fields) -> tuple[Message, ...]:
    name = next((name for name in SYSTEM if fields.get(name)), None)
    if name is None:
        fields.read.update(SYSTEM)  # an empty one asks for nothing
        return ()
    text = fields.text(name)
    others = [other for other in SYSTEM if fields.get(other) and other not in fields.read]
    if any(fields.text(other) != text for other in others):
        raise RecordError(
            "ambiguous_prompt",
            f"{name!r} and {others[0]!r} differ: say which is the system's turn with --columns system=COLUMN",
            malformed=True,
        )
    if isinstance(text, str):
        return ({"role": "system", "content": text},) if text.strip() else ()
    if any(turn["role"] not in ("system", "developer") for turn in text):
        raise RecordError("wrong_type", f"field {name!r} has a turn of the {text[0]['role']}'s", malformed=True)
    return text


def _history(fields: Fields) -> tuple[Message, ...]:
    """Turns before the prompt: messages, or LlamaFactory's list of [question, answer]."""
    fields.read.add("history")
    value = fields.get("history")
    if not value:
        return ()
    if isinstance(value, list) and all(isinstance(item, list | tuple) and len(item) == 2 for item in value):
        if any(not isinstance(text, str) for item in value for text in item):
            raise RecordError("wrong_type", "field 'history' has a pair that is not two texts", malformed=True)
        roles = ("user", "assistant")
        return tuple({"role": role, "content": text} for item in value for role, text in zip(roles, item, strict=True))
    turns = read_text(value, "history", fields.unread)
    if isinstance(turns, str):
        raise RecordError("wrong_type", "field 'history' is text, not turns", malformed=True)
    return turns


def read_template_kwargs(fields: Fields) -> dict[str, Any]:
    """What the chat template is given besides the turns: ``tools`` and ``chat_template_kwargs``."""
    fields.read.update(FOR_TEMPLATE)
    given: dict[str, Any] = {}
    for name in ("template_kwargs", "chat_template_kwargs"):
        value = fields.get(name) or {}
        if not isinstance(value, dict):
            raise RecordError("wrong_type", f"field {name!r} is not an object", malformed=True)
        ours = {"tools"} if name == "template_kwargs" else set()  # of records that were built
        if reserved := RESERVED & value.keys() - ours:
            found = ", ".join(sorted(reserved))
            raise RecordError(
                "wrong_type",
                f"field {name!r} sets {found}, which is not the data's to say; tools have a column 'tools'",
                malformed=True,
            )
        given |= without_nulls(value)
    for name in ("functions", "tools"):  # the first are tools as OpenAI wrote them before
        if not (tools := fields.get(name)):
            continue
        if not isinstance(tools, list):
            raise RecordError("wrong_type", f"field {name!r} is not a list", malformed=True)
        tools = without_nulls([_tool(tool) for tool in tools])
        given["tools"] = [{"type": "function", "function": tool} for tool in tools] if name == "functions" else tools
    return given


def _tool(tool: Any) -> Any:
    """A tool's description; a table or LlamaFactory holds it as JSON."""
    if isinstance(tool, str):
        try:
            tool = json.loads(tool)
        except ValueError as error:
            raise RecordError("wrong_type", f"field 'tools' holds no JSON: {error}", malformed=True) from error
    return tool
