"""YAML that a person wrote: a key that stands twice is told, where PyYAML would keep the last."""

import pytest
import yaml

from diffdpo.errors import UserError
from diffdpo.settings.yaml_text import by_flag_name, read_once

MERGED = """
base: &base {a: 1, b: 2}
more: &more {<<: *base, b: 3}
most: {<<: *more, a: 5, deeper: [{<<: *more, b: 6}]}
'1': x
1: y
? [p, q]
: z
"""


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a: 1\nb: 2\na: 3\n", "a stands twice, in lines 1 and 3"),
        ("a: 1\n'a': 2\n", "a stands twice"),
        ("x: [{y: {b: 1, b: 1}}]", "b stands twice, in line 1"),
        ("x: &m {a: 1, a: 2}\ny: {<<: *m}", "a stands twice"),
    ],
)
def test_a_key_that_stands_twice(text, named):
    with pytest.raises(UserError, match=named):
        read_once(text)


def test_all_else_is_read_as_by_pyyaml():
    text = MERGED.replace("? [p, q]\n: z\n", "")
    assert read_once(text) == yaml.safe_load(text)
    for wrong in ("a: [", MERGED, "!!python/object:os.system {}"):
        with pytest.raises(yaml.YAMLError):
            read_once(wrong)


def test_two_spellings_of_one_name():
    assert by_flag_name({"max-steps": 1, "beta": 2}) == {"max_steps": 1, "beta": 2}
    assert by_flag_name({"--max-steps": 1}, strip="-") == {"max_steps": 1}
    with pytest.raises(UserError, match="max_steps stands twice, as max-steps and max_steps"):
        by_flag_name({"max-steps": 1, "max_steps": 1})
