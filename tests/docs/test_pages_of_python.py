"""The pages whose Python runs from the first block to the last, in one process, as in a notebook."""

import re

import pytest

from tests.support.paths import ROOT

PAGES = {"python": 6, "extending": 5}


def blocks_of(page: str) -> list[str]:
    text = (ROOT / "docs" / f"{page}.md").read_text()
    return re.findall(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize(("page", "at_least"), PAGES.items())
def test_every_block_runs(page, at_least, tmp_path, command, python):
    blocks = blocks_of(page)
    assert len(blocks) >= at_least
    (tmp_path / "page.py").write_text("\n".join(blocks) + "\nprint('the page ends here')\n")
    done = command([python, "page.py"], cwd=tmp_path, timeout=500, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.rstrip().endswith("the page ends here")
