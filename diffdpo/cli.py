"""What every command shares: a parser that fails in one line, and exit code 2 for a user's mistake."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from data_pipeline.errors import DataError
from diffdpo.errors import UserError


class Parser(argparse.ArgumentParser):
    """``argparse`` without abbreviations, whose errors are one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see --help)\n")


def run(main: Callable[[list[str]], int | None]) -> NoReturn:
    """Run a command's ``main(argv)`` and exit: 0, 2 with one line for a user's mistake, 130 after Ctrl-C."""
    try:
        code = main(sys.argv[1:]) or 0
    except (UserError, DataError) as error:
        print("error: " + " ".join(str(error).split()), file=sys.stderr)
        code = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    sys.exit(code)
