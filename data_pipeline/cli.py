"""What the data commands share: a parser that fails in one line, and exit code 2 for a user's mistake."""

import argparse
import sys
from collections.abc import Callable
from typing import NoReturn

from data_pipeline.errors import DataError


class Parser(argparse.ArgumentParser):
    """``argparse`` without abbreviations, whose errors are one line."""

    def __init__(self, **kwargs):
        super().__init__(allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter, **kwargs)

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
