"""Names, passwords and signatures in addresses: never in a line or a file that others may read."""

import re

from data_pipeline.errors import DataError

SECRET_WORDS = r"pass|pwd|token|secret|signature|sig|credential|key|auth|jwt|hmac|policy|session|ticket|odbc_connect"
_USER_PART = re.compile(r"(?<=://)(?:[^/?#\s]*|[^/@\s]+:[^@\s,]*)@")  # a password may hold what ends a host
_SECRET_PARAMETER = re.compile(rf"(?i)([?&;#][^=&;#\s]*(?:{SECRET_WORDS})[^=&;#\s]*=)[^&;#\s,'\"]*")


def hidden(text: str) -> str:
    """``text`` with *** for what stands before the @ of an address in it, and for its secret parameters."""
    return _SECRET_PARAMETER.sub(r"\1***", _USER_PART.sub("***@", text)) if "://" in text else text


def hidden_of(url: str, text: str) -> str:
    """``text`` without what ``url`` says before its @, also where it repeats that without the protocol."""
    for user in _USER_PART.findall(url):
        text = text.replace(user, "***@")
    return hidden(text)


def check_password(url: str) -> None:
    """DataError where nobody can tell a password's end from a path: ``https://name:p@ss/word@host/x``."""
    before_last_at, at, _ = url.partition("?")[0].partition("://")[2].rpartition("@")
    first = before_last_at.partition("/")[0]
    user, ended, _ = first.partition("@")
    is_port = not ended and user.rpartition(":")[2].isdigit()  # of a host without a user
    if at and ":" in user and not is_port and "@" in before_last_at and "/" in before_last_at:
        raise DataError(
            "an address has a password and a second @ behind a /; write @ and / of a password (or of a path) as %40 "
            "and %2F, or leave the password to the environment"
        )
