"""What the data commands share: a parser that fails in one line, and exit code 2 for a user's mistake."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import NoReturn

from data_pipeline.errors import DataError


def program() -> str:
    """What the user typed to get here: ``diffdpo data`` or this package's own name."""
    return sys.argv[0] if sys.argv[0] == "diffdpo data" else "python -m data_pipeline"


LIKE = 0.75  # of difflib; words that differ by more are other words


class Parser(argparse.ArgumentParser):
    """``argparse`` without abbreviations, whose errors are one line; ``--a-flag`` is ``--a_flag``."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def parse_known_args(self, args=None, namespace=None):
        """As in argparse; what is not known comes back with underscores too."""
        return super().parse_known_args(
            [underscored(word) for word in (sys.argv[1:] if args is None else args)], namespace
        )

    def parse_args(self, args=None, namespace=None):
        """As in argparse; an unknown flag is answered with the nearest name."""
        known, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(unknown(rest, self.flags()))
        return known

    def flags(self) -> list[str]:
        """All names."""
        return [name for name in self._option_string_actions if name.startswith("--")]

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def exit_code(main: Callable[[list[str]], int | None], argv: list[str], user_errors: tuple = (DataError,)) -> int:
    """Run ``main(argv)``: its code, 2 with one line on stderr for a mistake or a failing disk, 130 after Ctrl-C."""
    try:
        return main(argv) or 0
    except user_errors as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `inspect ... | head`: the reader has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:  # disk full, no permission: the message names the file
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


def underscored(word: str) -> str:
    """``--a-flag=value`` → ``--a_flag=value``; what is no flag stays as it is."""
    name, equals, value = word.partition("=")
    return "--" + name[2:].replace("-", "_") + equals + value if name.startswith("--") else word


def unknown(rest: Sequence[str], known: Iterable[str]) -> str:
    """What is said of words that no flag takes: the first, and the known name it may be meant for."""
    first = rest[0].partition("=")[0]
    if not first.startswith("-"):
        return f"{first!r} belongs to no flag"
    near = nearest(first, known)
    return f"there is no {first}" + (f"; is {near} meant?" if near else "")


def nearest(name: str, known: Iterable[str]) -> str | None:
    """The known name that ``name`` may be meant for: one that begins with it, or is written almost like it."""
    names = [each for each in known if each not in ("-h", "--help", "--help_all")]
    begins = [each for each in names if each.startswith(name)]
    return next(iter(begins or get_close_matches(name, names, 1, LIKE)), None)
