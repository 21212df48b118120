"""Several sources in one flag."""

import pytest

from data_pipeline.errors import DataError
from data_pipeline.names import source_names


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("a.jsonl", ["a.jsonl"]),
        ("a.jsonl, b/*.tar", ["a.jsonl", "b/*.tar"]),
        ("s-{0,1}.tar,org/name:train_prefs", ["s-{0,1}.tar", "org/name:train_prefs"]),
        ("s3://b/{a,b}-{0..3}.tar,c", ["s3://b/{a,b}-{0..3}.tar", "c"]),
    ],
)
def test_commas_outside_of_braces_part_sources(text, names):
    assert source_names(text) == names


@pytest.mark.parametrize("text", ["a,", ", a", "a,,b"])
def test_a_comma_beside_nothing_is_refused(text):
    with pytest.raises(DataError, match=f"'{text}' has a comma without a source"):
        source_names(text)


def test_a_name_with_a_comma_that_exists_is_one(tmp_path):
    path = tmp_path / "a,b.jsonl"
    path.touch()
    assert source_names(str(path)) == [str(path)]
