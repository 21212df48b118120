"""Verifiers: what a text gives as its result, so that a sampled answer can be compared with the right one.

A verifier has a name (:func:`find_verifier`): one of ``VERIFIERS``, ``regex:PATTERN`` or ``module:function``. All of
them answer the same two questions: what is right for a record (``truth``), and how right an answer is (``judge``).

A reading verifier reads the result out of a whole answer (``read``) and writes a result that is stated on its own, say
in a record's ``meta``, in the same way (``plain``). Both give None where there is none. Add one to ``VERIFIERS`` and
every command knows it.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from data_pipeline.cli import nearest
from data_pipeline.errors import DataError
from data_pipeline.user_function import user_function

ANSWER_MARK = "The answer is"
REGEX = "regex:"
NAME = re.compile(r"\s*[A-Za-z_][\w./-]*\s*([:@].*)?$")  # of a verifier or a task
WAYS = "regex:PATTERN and module:function"


class Judge(Protocol):
    """What every verifier can do."""

    def truth(self, stated: object, answer: str) -> str | None:
        """The right result of a record: the one ``stated`` with it, else that of its right ``answer``; None where
        neither gives one."""
        ...

    def judge(self, text: str, truth: str, prompt: object = "") -> float:
        """How right the answer ``text`` is, from 0 to 1. DataError where a user's function fails."""
        ...


@dataclass(frozen=True)
class Verifier:
    """How results are read for one task."""

    read: Callable[[str], str | None]
    plain: Callable[[str], str | None]

    def truth(self, stated: object, answer: str) -> str | None:
        """The right result of a record: the one ``stated`` with it, else that of its right ``answer``."""
        found = None if stated is None else self.plain(str(stated))
        return self.read(answer) if found is None else found

    def judge(self, text: str, truth: str, prompt: object = "") -> float:
        """1 where the result that ``text`` gives is ``truth``, else 0."""
        return float(self.read(text) == truth)


@dataclass(frozen=True)
class FunctionVerifier:
    """A user's ``function(answer, truth, prompt)``: whether an answer is right, or how right it is, from 0 to 1.

    ``truth`` is the result stated with the record, else its right answer; ``prompt`` a text or chat messages.
    """

    name: str
    function: Callable[[str, str, object], object]

    def truth(self, stated: object, answer: str) -> str:
        """What is stated, else the right answer as it is: the function knows what to look for."""
        return answer if stated is None else str(stated)

    def judge(self, text: str, truth: str, prompt: object = "") -> float:
        """What the function says. DataError where it raises, or says what is no truth value or number from 0 to 1."""
        try:
            said = self.function(text, truth, prompt)
        except (Exception, SystemExit) as error:  # a function that ends the process has failed too
            raise DataError(
                f"verifier {self.name} failed on the answer {_short(text)}: {type(error).__name__}: {error}"
            ) from error
        try:
            value = float(said)  # type: ignore[arg-type]
        except Exception:  # of a number beyond all floats, or whatever the user's own type raises
            value = float("nan")
        if not 0 <= value <= 1 or isinstance(said, str):
            raise DataError(
                f"verifier {self.name} said {said!r} of the answer {_short(text)}; it must say True, False or a number "
                "from 0 to 1"
            )
        return value


def _short(text: str) -> str:
    return repr(text if len(text) <= 80 else text[:77] + "...")


# ---------------------------------------------------------------------------------------------- reading results


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


def read_number(text: str) -> str | None:
    """The last number of the text, written as :func:`read_gsm8k` writes it."""
    found = re.findall(r"(?<![\w.])-?\$?\d[\d,]*(?:\.\d+)?|(?<![\w.])-?\.\d+", text)
    return f"{float(re.sub('[$,]', '', found[-1])):.12g}" if found else None


def read_exact(text: str) -> str | None:
    """The text itself, runs of white space as one space; None where it is empty."""
    return " ".join(text.split()) or None


VERIFIERS = {
    "arithmetic": Verifier(read_arithmetic, whole_number),
    "gsm8k": Verifier(read_gsm8k, lambda text: read_gsm8k(text) or read_gsm8k(f"#### {text}")),
    "number": Verifier(read_number, read_number),
    "exact": Verifier(read_exact, read_exact),
}


def find_verifier(name: str) -> Judge:
    """The verifier of this name. DataError for a name that nothing has, a pattern that is none, and a function that
    cannot be had."""
    if name in VERIFIERS:
        return VERIFIERS[name]
    if name.startswith(REGEX):
        return _of_pattern(name.removeprefix(REGEX))
    if ":" in name:
        return FunctionVerifier(name, user_function(name, ("answer", "truth", "prompt"), what="verifier"))
    near = nearest(name, VERIFIERS)
    raise DataError(
        f"there is no verifier {name!r}{f'; is {near} meant?' if near else ''} (known: {', '.join(VERIFIERS)}, {WAYS})"
    )


def split_names(text: str) -> list[str]:
    """Names of a text with commas between them. A comma inside a pattern is the pattern's, unless what follows is
    written like a name."""
    names: list[str] = []
    for part in text.split(","):
        if names and names[-1].startswith(REGEX) and not NAME.match(part):
            names[-1] += "," + part
        else:
            names.append(part.strip())
    return names


def _of_pattern(pattern: str) -> Verifier:
    """The last match's first group, or the whole match where the pattern has none."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise DataError(f"verifier regex:{pattern} is no regular expression: {error}") from None
    if not pattern:
        raise DataError(r"verifier regex: has no pattern; write for example 'regex:Answer: (\w+)'")

    def read(text: str) -> str | None:
        found = list(compiled.finditer(text))
        group = (found[-1][1] if compiled.groups else found[-1][0]) if found else None
        return group.strip() if group is not None else None

    def plain(text: str) -> str | None:
        return read(text) or read_exact(text)

    return Verifier(read, plain)
