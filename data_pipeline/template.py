"""A tokenizer's chat template: whether it can be used, and the text it makes of turns.

What a template does not write the model does not see. So it is tried out before anything else is done, and a record is
refused of which it would leave a part out.
"""

import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import cache
from typing import Any

from jinja2 import TemplateError

from data_pipeline.errors import DataError
from data_pipeline.records import Message, aside_of
from data_pipeline.telling import warn_once

PROBE = "\ue001"  # for private use: in no template
NOW = datetime(2025, 1, 1)
"""The time for templates that ask for it: equal prompts must be equal today, tomorrow and after a resume."""
BLANKS = re.compile(r"[\s\\]+")
CHANCE = re.compile(r"\|\s*random\b")
CLOCK = "strftime_now"
CLOCK_READ = re.compile(CLOCK + r"""\(\s*(?P<quote>['"])(?P<format>[^'"]*)(?P=quote)\s*\)""")
MEND = "mend it, or use --template plain"


class LeftOut(TemplateError):
    """What the template would leave out of a record, in our words."""


class UnusableTemplate(TemplateError):
    """A template that fails otherwise than by refusing a conversation in its own words."""


def has_template(tokenizer: Any) -> bool:
    """Whether the tokenizer has a chat template."""
    return bool(getattr(tokenizer, "chat_template", None))


def check_template(tokenizer: Any) -> None:
    """DataError, in one line, for a chat template that cannot be used: it does not parse, has no default, wants other
    contents than text, or leaves the content out. Warns of one that reads the clock."""
    turns: list[Message] = [{"role": "user", "content": PROBE}]
    try:
        text = render(tokenizer, turns)
    except TemplateError as error:
        if type(error) is TemplateError:  # its own words: it may take other conversations
            return
        raise DataError(f"the tokenizer's chat template cannot be used: {_line(error)}; {MEND}") from error
    if PROBE not in text:
        raise DataError(f"the tokenizer's chat template {_why_left_out(tokenizer)}; {MEND}")
    if CHANCE.search(source := source_of(tokenizer)):
        raise DataError(f"the tokenizer's chat template leaves something to chance; {MEND}")
    if CLOCK in source:
        warn_once(f"the chat template reads the clock: it is given {NOW:%d %B %Y} in all that is trained and scored")
        if CLOCK in re.sub(rf"{CLOCK}\s+is\s", "", _pinned(source)):
            raise DataError(f"the tokenizer's chat template reads the clock in a way that cannot be held still; {MEND}")


def _why_left_out(tokenizer: Any) -> str:
    parts: list[Any] = [{"role": "user", "content": [{"type": "text", "text": PROBE}]}]
    try:
        wants_parts = PROBE in render(tokenizer, parts)
    except TemplateError:
        wants_parts = False
    found = "reads contents as lists of parts, and here they are text" if wants_parts else "does not write it"
    return f"leaves the content of a user's turn out: it {found}"


def source_of(tokenizer: Any, kwargs: Mapping[str, Any] | None = None) -> str:
    """The text of the template in use; '' where there is none."""
    try:
        return tokenizer.get_chat_template(tools=(kwargs or {}).get("tools"))
    except ValueError:  # several, and no default among them
        return ""


def render(tokenizer: Any, turns: Sequence[Message], kwargs: Mapping[str, Any] | None = None) -> str:
    """The turns as the model meets them, up to where its answer begins: behind the header of the assistant's turn, or,
    where the last turn is the assistant's, behind its content. Raises TemplateError with the template's own words."""
    if turns and turns[-1]["role"] == "assistant":
        text = _apply(tokenizer, turns, kwargs, continue_final_message=True)
        content = turns[-1]["content"]
        blanks = content[len(content.rstrip()) :]  # trimmed by many templates, and a part of what is continued
        return text if not blanks or text.endswith(content) else text + blanks
    return _apply(tokenizer, turns, kwargs, add_generation_prompt=True)


def render_answer(
    tokenizer: Any, turns: Sequence[Message], answer: Message, kwargs: Mapping[str, Any] | None = None
) -> str:
    """What the template writes of an answer behind its prompt, with what it thinks and the tools it calls. Raises
    TemplateError where it leaves some of that out or writes the prompt differently."""
    prompt, whole = render(tokenizer, turns, kwargs), _apply(tokenizer, [*turns, answer], kwargs)
    if whole == _apply(tokenizer, [*turns, answer], kwargs, add_generation_prompt=True):
        raise LeftOut(
            f"the chat template appends a header to every answer, so {_names(answer)} of an answer cannot be told apart"
        )
    text = whole.removeprefix(prompt)
    if text == whole or not all(part in text for part in _said(answer)):
        raise LeftOut(f"the chat template does not write {_names(answer)} of an answer")
    # what closes every turn is no part of this answer: the encoder puts the terminator there
    plain = _apply(tokenizer, [*turns, {"role": "assistant", "content": PROBE}], kwargs)
    return text.removesuffix(plain.rpartition(PROBE)[2])


def _names(turn: Message) -> str:
    return " and ".join(map(repr, aside_of(turn)))


def _said(turn: Message) -> list[str]:
    """Texts that must stand in what a template writes of a turn."""
    calls = [call.get("function", call) for call in _calls(turn)]
    thought = [value for name, value in aside_of(turn).items() if isinstance(value, str)]
    return [text.strip() for text in (turn["content"], *thought, *(str(call.get("name", "")) for call in calls))]


def check_reads(tokenizer: Any, turns: Sequence[Message], kwargs: Mapping[str, Any]) -> None:
    """TemplateError where the template reads nothing of what stands beside the contents: thoughts, calls of tools,
    their descriptions. (Of what it reads it may leave out what its model does not want to see again.) A switch that it
    does not know, such as ``enable_thinking``, is told: it says nothing that would be lost."""
    switches = {name for name, value in kwargs.items() if isinstance(value, bool | int | float)}
    given = {*kwargs} - switches
    given.update(name for turn in turns for name in aside_of(turn))
    source = source_of(tokenizer, kwargs) if given or switches else ""
    for name in sorted(switches):
        if not re.search(rf"\b{name}\b", source):
            warn_once(f"the chat template does not read {name!r}, which rows set: it changes nothing")
    for name in sorted(given):
        if not re.search(rf"\b{name}\b", source):
            raise LeftOut(f"the chat template does not read {name!r}")


def check_written(text: str, turns: Sequence[Message], kwargs: Mapping[str, Any]) -> None:
    """TemplateError where the rendered ``text`` lacks what a turn says, a tool or a call: templates pass over roles
    that they do not know, and over all turns but the last. (Thoughts before an answer that is not the last may go.)"""
    contents = [_bare(turn["content"].split("</think>")[-1]) for turn in turns]
    written = _bare(text)
    for turn, content in zip(turns, contents, strict=True):
        if content and written.count(content) < sum(content in other for other in contents):
            raise LeftOut(
                f"the chat template does not write what a turn of the role {turn['role']!r} says, as it stands"
            )
    calls = [call.get("function", call) for turn in turns for call in _calls(turn)]
    tools = [tool.get("function", tool) for tool in kwargs.get("tools") or [] if isinstance(tool, dict)]
    for what, named in (("a tool", tools), ("a call of a tool", calls)):
        for name in (str(item.get("name") or "") for item in named if isinstance(item, dict)):
            if _bare(name) not in written:
                raise LeftOut(f"the chat template does not write {what}, {name!r}")


def _bare(text: str) -> str:
    """A text without what templates change around and in it: blanks, and the signs that JSON needs."""
    return BLANKS.sub("", text)


def _calls(turn: Message) -> list[dict]:
    calls = [*(turn.get("tool_calls") or []), *([turn["function_call"]] if turn.get("function_call") else [])]
    return [call for call in calls if isinstance(call, dict)]


def _apply(tokenizer: Any, turns: Sequence[Message], kwargs: Mapping[str, Any] | None, **how: bool) -> str:
    given = {**(kwargs or {}), **how}
    try:
        if CLOCK in (source := source_of(tokenizer, kwargs)):
            given["chat_template"] = _pinned(source)
        return tokenizer.apply_chat_template(list(turns), tokenize=False, **given)
    except TemplateError:
        raise
    except Exception as error:  # a template is somebody's program: whatever it does wrong is an error of the template
        raise UnusableTemplate(_line(error)) from error


@cache
def _pinned(source: str) -> str:
    """A template with ``NOW`` written into its text where it asks for the time: transformers hands no functions on."""
    return CLOCK_READ.sub(lambda found: repr(NOW.strftime(found["format"])), source)


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
