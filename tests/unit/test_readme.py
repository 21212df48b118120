"""README and docs/architecture.md: links lead somewhere, commands exist, the tree is the tree."""

import re

import pytest

from tests.support import tree
from tests.support.paths import ROOT

README = (ROOT / "README.md").read_text()
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


def test_the_tree_is_that_of_the_code():
    assert tree.DOCUMENT.read_text() == tree.document(), "python -m tests.support.tree writes it anew"


def test_every_module_says_what_it_is():
    for top in tree.TOPS:
        for path in (ROOT / top).rglob("*.py"):
            assert path.name == "__init__.py" or tree.first_sentence(path), path


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_lead_to_files(document):
    for target in re.findall(r"\]\(([^)#:\s]+)\)", document.read_text()):
        assert (document.parent / target).exists(), target


def test_the_commands_that_the_readme_names_exist():
    for path in re.findall(r"`(launch/\w+\.py)`", README):
        assert (ROOT / path).exists(), path
