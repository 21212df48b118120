"""Prompts cut to a number of tokens: content goes, what the template puts around it stays.

A prompt that lost the header of the assistant's turn would have the answer stand in the user's; one that lost its
beginning would have no sign of who speaks.
"""

from collections.abc import Callable, Sequence

from data_pipeline.records import Message

MARK = "\ue000"  # for private use: in no text, trimmed by no template

Render = Callable[[Sequence[Message]], str]
Tokens = Callable[[str], list[int]]


def keep_start(turns: Sequence[Message], limit: int, render: Render, tokens: Tokens) -> list[int] | None:
    """The first tokens of a conversation, then what stands behind its last content: the header of the answer's turn.
    None when ``limit`` has no room for any content."""
    head, tail = tokens(_around(turns, 0, render)[0]), tokens(_around(turns, len(turns) - 1, render)[2])
    room = limit - len(tail)
    return [*tokens(render(turns))[:room], *tail] if room > len(head) else None


def keep_end(turns: Sequence[Message], limit: int, render: Render, tokens: Tokens) -> list[int] | None:
    """The conversation from the first turn on (not an answer) from which it fits, the content of this cut at its
    beginning. None when ``limit`` has no room for any content."""
    for number, turn in enumerate(turns):
        if number and turn["role"] == "assistant":
            continue
        _, content, rest = map(tokens, _around(turns, number, render))
        head = tokens(_around([turn], 0, render)[0])
        room = limit - len(head) - len(rest)
        if room > 0:
            return [*head, *content[-room:], *rest]
    return None


def _around(turns: Sequence[Message], number: int, render: Render) -> tuple[str, str, str]:
    """The text before a turn's content, the content as the template has it, and the text behind."""
    marked: list[Message] = [*turns]
    marked[number] = {"role": turns[number]["role"], "content": MARK}
    before, _, behind = render(marked).partition(MARK)
    whole = render(turns)
    return before, whole[len(before) : len(whole) - len(behind)], behind
