"""Names and passwords in addresses: never in a record that others may read.

Those of the MLflow store go to the environment variables that MLflow knows, where a shipper finds them again; of every
other address only what is shown is rid of them.
"""

import os
import re
from urllib.parse import parse_qsl, quote, unquote, urlencode

from data_pipeline.addresses import hidden
from diffdpo.errors import UserError

__all__ = ["hidden"]

USER, PASSWORD, TOKEN = "MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN"
STORE = "MLFLOW_TRACKING_URI"
DATABASES = ("postgresql", "mysql", "mssql")
IN_QUERY = {"user": USER, "username": USER, "password": PASSWORD, "passwd": PASSWORD}
"""Parameters of a database's address that say who asks."""


def taken(uri: str, source: str = "--tracking_uri") -> str:
    """The store's address without user, password and secret parameters, which this process's environment now holds.

    UserError, without the address, where a sign in a password hides where the password ends.
    """
    scheme, mark, rest = uri.partition("://")
    if not mark or scheme == "sqlite":
        return uri
    place = re.match(r"[^/?#]*", rest)[0]  # type: ignore[index]  # matches nothing at least
    who, at, _ = place.rpartition("@")
    # the @ of a password's end is found elsewhere; in a database's query it may be that of a user's name
    behind = rest.removeprefix(who + at)
    if "@" in (behind.partition("?")[0] if is_database(uri) and re.search(r"\?.+=", rest) else behind):
        raise UserError(f"{source} has a password with one of / ? #; write it as %2F, %3F or %23, or set {PASSWORD}")
    user, _, password = who.partition(":")
    _into_environment({USER: unquote(user), PASSWORD: unquote(password)})
    left = f"{scheme}://{_without_secret_parameters(behind)}"
    if hidden(left) != left:
        raise UserError(
            f"{source} has a secret among its parameters ({hidden(left)!r}), which every record of the run would hold; "
            f"leave it out and set {PASSWORD} or {TOKEN}"
        )
    return left


def _without_secret_parameters(rest: str) -> str:
    """``host/path?query`` without the parameters of a database's address that are secret."""
    path, mark, query = rest.partition("?")
    kept = []
    for name, value in parse_qsl(query, keep_blank_values=True):
        if name.lower() in IN_QUERY:
            _into_environment({IN_QUERY[name.lower()]: value})
        else:
            kept.append((name, value))
    return path + (mark + urlencode(kept) if kept else "")


def _into_environment(found: dict[str, str]) -> None:
    os.environ.update({name: value for name, value in found.items() if value})


def given_back(uri: str) -> str:
    """The address that MLflow is to be asked by: a database's with user and password, which MLflow reads from nowhere
    else; a server's as it is."""
    scheme, _, rest = uri.partition("://")
    user, password = os.environ.get(USER), os.environ.get(PASSWORD)
    if not is_database(uri) or not user or "@" in rest:
        return uri
    who = quote(user, safe="") + (f":{quote(password, safe='')}" if password else "")
    return f"{scheme}://{who}@{rest}"


def is_database(uri: str) -> bool:
    """Whether this is the address of a database with users."""
    return uri.partition(":")[0].partition("+")[0] in DATABASES


def are_told(uri: str) -> bool:
    """Whether this process tells the store who asks. A file asks nobody."""
    return not uri.startswith("sqlite") and any(os.environ.get(name) for name in (USER, PASSWORD, TOKEN))


def untold(text: object) -> str:
    """An error's words without the password and the token that the environment holds."""
    said = hidden(str(text))
    for name in (PASSWORD, TOKEN):
        for secret in {os.environ.get(name, ""), quote(os.environ.get(name, ""), safe="")} - {""}:
            said = said.replace(secret, "***")
    return said


def in_a_line(error: object, most: int = 160) -> str:
    """An error's words without secrets on one line: of many the first and the last, which say the cause."""
    line = " ".join(untold(error).split())
    return line if len(line) <= most else f"{line[: most // 2]} ... {line[-most // 2 :]}"
