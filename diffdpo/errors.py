"""The error a user can act on."""


class UserError(ValueError):
    """Bad input. The message is one line: what was found, what is allowed, what to change. Exit code 2."""
