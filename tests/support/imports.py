"""The imports of a tree of Python files, read from their text: who needs whom, and the circles among them."""

import ast
from collections.abc import Iterable, Mapping
from pathlib import Path

Graph = Mapping[str, set[str]]


def module_name(path: Path, root: Path) -> str:
    """``diffdpo.step.fit`` of ``diffdpo/step/fit.py``; a package's own name of its ``__init__.py``."""
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def graph_of(root: Path, tops: Iterable[str]) -> dict[str, set[str]]:
    """Module → the modules of the tree that it imports, also inside functions and for type checking."""
    paths = {module_name(path, root): path for top in tops for path in (root / top).rglob("*.py")}
    return {name: imports_of(path.read_text(), set(paths)) - {name} for name, path in paths.items()}


def imports_of(text: str, known: set[str]) -> set[str]:
    """Those of the ``known`` modules that a file's text imports."""
    found = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            for alias in node.names:
                whole = f"{node.module}.{alias.name}"
                found.add(whole if whole in known else node.module)
    return found & known


def of_packages(graph: Graph, depth: int = 2) -> dict[str, set[str]]:
    """The graph of packages (or of files right under the top) from that of modules."""

    def package(name: str) -> str:
        return ".".join(name.split(".")[:depth])

    found: dict[str, set[str]] = {}
    for name, others in graph.items():
        found.setdefault(package(name), set()).update(package(other) for other in others)
    return {name: others - {name} for name, others in found.items()}


def circle_in(graph: Graph) -> list[str]:
    """A circle of modules, the first again at its end; empty where there is none."""
    done: set[str] = set()

    def visit(name: str, path: list[str]) -> list[str]:
        if name in path:
            return [*path[path.index(name) :], name]
        if name in done:
            return []
        for other in sorted(graph.get(name, ())):
            if circle := visit(other, [*path, name]):
                return circle
        done.add(name)
        return []

    for name in sorted(graph):
        if circle := visit(name, []):
            return circle
    return []
