"""Prompts cut to a number of tokens: content goes, what the template puts around it stays.

A prompt that lost the header of the assistant's turn would have the answer stand in the user's; one that lost its
beginning would have no sign of who speaks.
"""

from collections.abc import Callable, Sequence

from jinja2 import TemplateError

from data_pipeline.records import Message

MARK = "\ue000"  # for private use: in no text, trimmed by no template

Render = Callable[[Sequence[Message]], str]
Tokens = Callable[[Sequence[str]], list[list[int]]]


def keep_start(turns: Sequence[Message], text: str, limit: int, render: Render, tokens: Tokens) -> list[int] | None:
    """The conversation (``text``: as rendered) up to the last turn (a question) of which something fits, the content of
    this cut at its end. None when ``limit`` has no room for any content."""
    around = _around(turns, render)
    contents = _contents(turns, around, text)
    before = [content + frame for content, frame in zip(["", *contents[:-1]], around[:-1], strict=True)]
    sizes = [len(ids) for ids in tokens(before)]  # of parts: about as many tokens as when joined
    for number in reversed(range(len(turns))):
        if turns[number]["role"] in ("assistant", "system") or sum(sizes[: number + 1]) >= limit:
            continue
        tail = around[-1] if number == len(turns) - 1 else _around(turns[: number + 1], render)[-1]
        head, ids, rest = tokens(["".join(before[: number + 1]), contents[number], tail])
        room = limit - len(head) - len(rest)
        if room > 0:
            return [*head, *ids[:room], *rest]
    return None


def keep_end(turns: Sequence[Message], text: str, limit: int, render: Render, tokens: Tokens) -> list[int] | None:
    """The conversation from the first turn on (not an answer) from which it fits, the content of this cut at its
    beginning. None when ``limit`` has no room for any content."""
    around = _around(turns, render)
    contents = _contents(turns, around, text)
    behind = [frame + content for frame, content in zip(around[1:], [*contents[1:], ""], strict=True)]
    sizes = [len(ids) for ids in tokens(behind)]  # of parts: about as many tokens as when joined
    for number, turn in enumerate(turns):
        if (number and turn["role"] == "assistant") or sum(sizes[number:]) >= limit:
            continue
        head, ids, rest = tokens([_around([turn], render)[0], contents[number], "".join(behind[number:])])
        room = limit - len(head) - len(rest)
        if room > 0:
            return [*head, *ids[-room:], *rest]
    return None


def _around(turns: Sequence[Message], render: Render) -> list[str]:
    """The texts that a template puts before, between and behind the contents of turns: one more than turns."""
    around = render([{"role": turn["role"], "content": MARK} for turn in turns]).split(MARK)
    if len(around) != len(turns) + 1:
        raise TemplateError("it does not write each content once, so a prompt that is too long cannot be cut")
    return around


def _contents(turns: Sequence[Message], around: list[str], text: str) -> list[str]:
    """The contents as they stand in the rendered text: templates may trim them."""
    contents, place = [], len(around[0])
    for turn, behind in zip(turns, around[1:], strict=True):
        whole = turn["content"]
        contents.append(whole if text.startswith(whole + behind, place) else whole.strip())
        place += len(contents[-1]) + len(behind)
    return contents
