"""Verifiers: what a text gives as its result, so that a sampled answer can be compared with the right one.

A task's verifier reads the result out of a whole answer (``read``) and writes a result that is stated on its own, say
in a record's ``meta``, in the same way (``plain``). Both give None where there is none. Add one to ``VERIFIERS`` and
``--eval_task`` knows it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass

ANSWER_MARK = "The answer is"


@dataclass(frozen=True)
class Verifier:
    """How results are read for one task."""

    read: Callable[[str], str | None]
    plain: Callable[[str], str | None]

    def truth(self, stated: object, answer: str) -> str | None:
        """The right result of a record: the one ``stated`` with it, else that of its right ``answer``."""
        found = None if stated is None else self.plain(str(stated))
        return self.read(answer) if found is None else found


def read_answer(text: str) -> int | None:
    """The number after the last ``The answer is``; None when the text gives no such answer."""
    tail = text.rpartition(ANSWER_MARK)[2] if ANSWER_MARK in text else ""
    digits = tail.strip().rstrip(".").strip()
    return int(digits) if digits.isdecimal() and digits.isascii() else None


def read_arithmetic(text: str) -> str | None:
    """The number after the last ``The answer is``."""
    number = read_answer(text)
    return None if number is None else str(number)


def whole_number(text: str) -> str | None:
    """A whole number that stands alone."""
    return str(int(text)) if re.fullmatch(r"\s*-?\d+\s*", text) else None


def read_gsm8k(text: str) -> str | None:
    """The number after the last ``####``, without commas, currency and idle zeros: 1,800.00 is 1800."""
    found = re.findall(r"####\s*(-?)\s*\$?\s*(-?[\d,]*\.?\d+)", text)
    try:
        return f"{float(''.join(found[-1]).replace(',', '')):.12g}"
    except (IndexError, ValueError):  # no number, or one with two signs
        return None


VERIFIERS = {
    "arithmetic": Verifier(read_arithmetic, whole_number),
    "gsm8k": Verifier(read_gsm8k, lambda text: read_gsm8k(text) or read_gsm8k(f"#### {text}")),
}
