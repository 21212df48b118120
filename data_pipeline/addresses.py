"""Names, passwords and signatures in addresses: never in a line or a file that others may read."""

import re

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
