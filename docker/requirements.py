"""The dependencies of pyproject.toml and of the extras named, a line each: for a layer of an image below the code.

Run in an image's build: ``python requirements.py gpu > requirements.txt``.
"""

import sys
import tomllib
from pathlib import Path

project = tomllib.loads(Path("pyproject.toml").read_text())["project"]
print(
    *project["dependencies"],
    *(line for extra in sys.argv[1:] for line in project["optional-dependencies"][extra]),
    sep="\n",
)
