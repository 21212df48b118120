"""The shape of the house: imports go one way, the heart stays small, nothing is probed for."""

import ast
import re
import tomllib

import pytest

from tests.support.imports import circle_in, graph_of, imports_of, of_packages
from tests.support.paths import ROOT

TOPS = ("diffdpo", "data_pipeline")
GRAPH = graph_of(ROOT, TOPS)
FLOORS = (
    {"errors", "quiet", "gpus", "cards", "children", "optional"},
    {"command"},
    {"shipped", "memory", "progress"},
    {"settings"},
    {"models"},
    {"noise"},
    {"engine"},
    {"scores"},
    {"losses"},
    {"config"},
    {"step"},
    {"reference"},
    {"sampling"},
    {"evaluation"},
    {"tracking"},
    {"setup"},
    {"training", "planner", "comparison", "doctor"},
    {"sweep", "onpolicy"},
    {"cli"},
    {"api"},
)
"""Rooms of diffdpo from the ground up: a room imports only from floors below its own."""
SOURCES = [path for top in (*TOPS, "launch") for path in sorted((ROOT / top).rglob("*.py"))]
LONGEST = 60  # lines of a function


def floor_of(room: str) -> int:
    return next(number for number, floor in enumerate(FLOORS) if room in floor)


def test_the_reader_of_imports_sees_what_is_there():
    known = {"a", "a.b", "a.c"}
    text = "import a.b\nfrom a import c\ndef f():\n    from a.b import thing\n"
    assert imports_of(text, known) == {"a.b", "a.c"}
    assert circle_in({"a": {"b"}, "b": {"c"}, "c": {"a"}}) == ["a", "b", "c", "a"]
    assert circle_in({"a": {"b", "c"}, "b": {"c"}, "c": set()}) == []


@pytest.mark.parametrize("kind", ["files", "packages", "packages of models"])
def test_no_circle_of_imports(kind):
    graph = {name: others for name, others in GRAPH.items() if name != "diffdpo"}  # its names are fetched when used
    if kind == "packages":
        graph = of_packages(graph)
    if kind == "packages of models":
        models = {n: o for n, o in graph.items() if n.startswith("diffdpo.models.")}
        graph = of_packages({n: {x for x in o if x.startswith("diffdpo.models.")} for n, o in models.items()}, depth=3)
    assert circle_in(graph) == []


def test_no_arrow_upwards():
    for name, others in GRAPH.items():
        parts = name.split(".")
        if parts[0] != "diffdpo" or len(parts) == 1 or parts[1] == "__main__":
            continue
        for other in others:
            if other.startswith("diffdpo.") and other.split(".")[1] != parts[1]:
                assert floor_of(other.split(".")[1]) < floor_of(parts[1]), f"{name} imports {other}"


def test_the_page_shows_these_floors():
    page = (ROOT / "docs" / "architecture.md").read_text()
    block = next(b for b in re.findall(r"^```text\n(.*?)^```", page, re.DOTALL | re.MULTILINE) if b.startswith("api\n"))
    lines = [set(re.sub(r"\(.*\)", "", line).split()) for line in block.splitlines()]
    assert tuple(reversed(lines)) == FLOORS


def test_data_pipeline_knows_nothing_of_models_and_engines():
    for name, others in GRAPH.items():
        if name.startswith("data_pipeline"):
            assert not [other for other in others if other.startswith("diffdpo")], name


@pytest.mark.parametrize("library", ["deepspeed", "torch.distributed"])
def test_one_room_knows_the_library(library):
    for path in SOURCES:
        text = path.read_text()
        named = re.search(rf"^\s*(import|from) {re.escape(library)}\b", text, re.MULTILINE)
        assert not named or "diffdpo/engine/" in path.as_posix(), path


def test_one_room_opens_a_deepspeed_json_and_knows_its_stages():
    for path in SOURCES:
        if "diffdpo/engine/" not in path.as_posix():
            text = path.read_text()
            assert "zero_optimization" not in text and "read_ds_config" not in text, path
            assert not re.search(r"\bstage\b.{0,12}[<>=]=? ?[0-3]\b|zero_stage", text), path


def test_one_helper_writes_files_whole():
    """A file beside its place and a rename, by hand, is a power cut away from an empty file."""
    beside = {"files.py", "generate.py"}  # the helper; and answers, which stay where sampling was broken off
    for path in SOURCES:
        assert path.name in beside or not re.search(r"\bpartial\.replace\(", path.read_text()), path


def test_functions_fit_on_a_screen():
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno + 1 <= LONGEST, f"{path}: {node.name}"


def test_the_heart_is_small():
    assert len((ROOT / "diffdpo/step/step.py").read_text().splitlines()) <= 150


def test_settings_are_not_probed_for():
    for path in SOURCES:
        if "diffdpo/models/" not in path.as_posix():  # a published config may lack a key: that is no setting of ours
            probed = r"getattr\(([\w.()]+\.)?(config|settings|args|shape), \"\w+\", "
            assert not re.search(probed, path.read_text()), path


def test_a_docstring_needs_no_other():
    """It says what its own function is or does, and does not go on from the one above."""
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
                text = ast.get_docstring(node) or "whole"
                assert not re.match(r"(Of|The same|Both|Itself|Those|See above)\b", text), f"{path}: {node.name}"


def test_a_parameter_of_a_loss_is_declared_in_one_file():
    users = [path for path in SOURCES if "simpo_gamma" in path.read_text()]
    assert [path.relative_to(ROOT).as_posix() for path in users] == ["diffdpo/losses/preference.py"]


def test_every_package_is_in_the_wheel():
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    found = {
        ".".join(path.parent.relative_to(ROOT).parts) for top in TOPS for path in (ROOT / top).rglob("__init__.py")
    }
    assert found | {"diffdpo.ds_configs", "diffdpo.recipes"} == set(settings["packages"])
