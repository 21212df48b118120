"""Names of metrics as MLflow takes them. One that it refuses would hold up all points from there on."""

import hashlib
import posixpath

LONGEST = 250
KEPT = set("_-./ :")
PLAIN = {"@": "_"}
"""Signs whose place another takes; names with others, which could become alike, end in a digest."""


def mlflow_name(name: str) -> str:
    """``name`` itself where MLflow takes it: letters, digits, some signs, a path without ``..`` and empty parts."""
    plain = "".join(PLAIN.get(sign, sign) for sign in name)
    known = "".join(sign if sign.isalnum() or sign in KEPT else "_" for sign in plain)
    path = posixpath.normpath(known).lstrip("/").replace("..", "_")
    if path == plain and len(path) <= LONGEST:
        return path
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=3).hexdigest()
    return f"{path[: LONGEST - 1 - len(digest)]} {digest}"
