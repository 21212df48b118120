"""The error a user can act on, for data."""


class DataError(ValueError):
    """Bad data or a bad data option. The message is one line: what was found, what is allowed, what to change."""
