"""Where the answer begins in a text that writes its turns down with markers, such as ``User:`` or ``<|im_start|>user``.

Anthropic's own transcripts are a format (``formats.py``); these are the other ways in which the field writes turns into
one text.
"""

import re
from dataclasses import dataclass

from data_pipeline.records import RecordError


@dataclass(frozen=True)
class Markers:
    """What begins a turn: of whoever asks (or instructs), and of the assistant."""

    asks: re.Pattern
    answers: re.Pattern


def _words(asks: str, answers: str, before: str, after: str) -> Markers:
    return Markers(*(re.compile(f"{before}(?:{words}){after}", re.IGNORECASE) for words in (asks, answers)))


STYLES = (
    _words("user|system", "assistant", r"<\|im_start\|>", "\n?"),
    _words("user|system", "assistant", r"<\|start_header_id\|>", r"<\|end_header_id\|>\n*"),
    _words("user|system", "assistant", r"<[|｜]", "[|｜]>\n?"),
    _words("user", "model", "<start_of_turn>", "\n?"),
    _words("human|user|system", "assistant", "<role>", "</role>"),
    Markers(re.compile(r"(?:<s>\s*)?\[INST\]"), re.compile(r"\[/INST\]")),
    _words("human|user|instruction|input|question|system", "assistant|response|output|answer|ai|gpt", r"###\s*", ":"),
    _words(
        r"human|user|question|instruction|customer|system|q",
        "assistant|response|answer|ai|bot|gpt|chatgpt|model|agent|a",
        r"(?:\A|\n)\s*\**",
        r"\**:\**",
    ),
    Markers(re.compile(r"\bUSER:"), re.compile(r"\bASSISTANT:")),
    _words(
        "问|問|问题|質問|提问|用户|用戶|ユーザー|사용자|질문",
        "答|回答|答案|助手|アシスタント|어시스턴트|답변",
        r"(?:\A|(?<=[\s。！？?!]))",
        "[:：]",
    ),
)


def answer_begins(chosen: str, rejected: str, common: int) -> int | None:
    """Where the answers begin in two texts that share their first ``common`` characters: behind the first marker of the
    assistant's after the last question there. None for texts that are not written so. RecordError where a question
    comes behind it: then the answers are none to the same turns."""
    for style in STYLES:
        asked = [found.end() for found in style.asks.finditer(chosen, 0, common)]
        if not asked:
            continue
        begins = style.answers.search(chosen, asked[-1], common)
        goes_on = style.asks if begins else style.answers  # without: they part within the question
        if any(goes_on.search(text, begins.end() if begins else common) for text in (chosen, rejected)):
            raise RecordError("not_one_answer", "after the common turns stands not one assistant turn but several")
        if begins:
            return begins.end()
    return None
