"""The README's tree names every module, and its links lead somewhere."""

import re

from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()


def test_every_module_is_in_the_tree():
    names = [
        path.name
        for top in ("launch", "diffdpo", "data_pipeline", "benchmarks")
        for path in (ROOT / top).rglob("*.py")
        if path.name != "__init__.py"
    ]
    tree = README.split("## Where what is")[1]
    for name in set(names):
        assert len(re.findall(rf"^ +{re.escape(name)} ", tree, re.MULTILINE)) == names.count(name), name


def test_links_lead_to_files():
    for target in re.findall(r"\]\(([^)#:]+)\)", README):
        assert (ROOT / target).exists(), target


def test_the_commands_of_the_tree_exist():
    for path in re.findall(r"`(launch/\w+\.py)`", README):
        assert (ROOT / path).exists(), path
