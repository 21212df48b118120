"""What the data commands share: a parser that fails in one line, and exit code 2 for a user's mistake."""

import argparse
import sys
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from typing import NoReturn

from data_pipeline.addresses import hidden
from data_pipeline.errors import DataError


def program() -> str:
    """What the user typed to get here: ``diffdpo data`` or this package's own name."""
    return sys.argv[0] if sys.argv[0] == "diffdpo data" else "python -m data_pipeline"


LIKE = 0.75  # of difflib; words that differ by more are other words


class Help(argparse.HelpFormatter):
    """A flag a line with its default, where there is one; a usage of one line; allowed values below their flag."""

    COLUMN, WIDTH = 35, 120

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=self.COLUMN, width=self.WIDTH)

    def add_usage(self, usage, actions, groups, prefix=None):
        """The sources and the flags that must be given; the others are listed below."""
        flags = [action for action in actions if action.option_strings and action.dest != "help"]
        words = [self._prog]
        words += [f"{action.option_strings[0]} {self._word(action)}" for action in flags if action.required]
        words += ["[--FLAG VALUE ...]"] if flags else []
        for action in actions:
            if not action.option_strings:
                words.append(action.dest.upper() + (" ..." if action.nargs in ("+", "*") else ""))
        super().add_usage(usage or " ".join(words).replace("%", "%%"), actions, groups, prefix)

    def _word(self, action: argparse.Action) -> str:
        if action.metavar is not None or action.choices:
            return str(action.metavar or "NAME")
        return "N" if action.type is int else "X" if action.type is float else "TEXT"

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return self._word(action)

    def _metavar_formatter(self, action, default_metavar):
        word = action.metavar or ("NAME" if action.option_strings and action.choices else default_metavar)
        return lambda size: (word,) * size

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help
        if text and action.choices and action.option_strings:
            text += f"; one of: {', '.join(map(str, action.choices))}"
        by_itself = isinstance(action.default, (int, float, str)) and not isinstance(action.default, bool)
        if not text or not by_itself or action.default == argparse.SUPPRESS or not action.option_strings:
            return text
        return f"{text} (default: %(default)s)"


class Parser(argparse.ArgumentParser):
    """``argparse`` without abbreviations, whose errors are one line; ``--a-flag`` is ``--a_flag``."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=Help, **kwargs)

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
        print("error: " + hidden(" ".join(str(error).split())), file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `inspect ... | head`: the reader has seen enough
        sys.stderr.close()
        return 0
    except OSError as error:  # disk full, no permission: the message names the file
        print("error: " + hidden(" ".join(str(error).split())), file=sys.stderr)
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
