"""The errors a user can act on, and the exit codes of a run that ends otherwise."""

RESUMABLE = 3  # told to stop; it can go on
HUNG = 4  # a process waited in vain for another


class UserError(ValueError):
    """Bad input. The message is one line: what was found, what is allowed, what to change. Exit code 2."""


class TrainingError(RuntimeError):
    """A run that cannot go on, whose input was not at fault. The message is one line: what happened, what to change.
    Exit code 1."""


class Stopped(BaseException):
    """SIGTERM came where there was nothing to save. Exit code 3."""
