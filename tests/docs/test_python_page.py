"""docs/python.md runs from its first block to its last."""

import re

from tests.support.paths import ROOT

BLOCKS = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs/python.md").read_text(), re.DOTALL | re.MULTILINE)


def test_every_block_runs(tmp_path, command, python):
    """In one process, as in a notebook; the last lines tell that it came to its end."""
    assert len(BLOCKS) >= 6
    (tmp_path / "page.py").write_text("\n".join(BLOCKS) + "\nprint('the page ends here')\n")
    done = command([python, "page.py"], cwd=tmp_path, timeout=400, PYTHONPATH=str(ROOT))
    assert done.returncode == 0, done.stderr[-3000:]
    assert "learning_rate is meant?" in done.stdout and done.stdout.rstrip().endswith("the page ends here")
