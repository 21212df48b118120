"""Verifiers by name: what they read, how they judge, and what they say of a user's mistake."""

import sys

import pytest

from data_pipeline.errors import DataError
from data_pipeline.verifiers import VERIFIERS, FunctionVerifier, find_verifier, split_names


@pytest.mark.parametrize(
    ("name", "text", "result"),
    [
        ("number", "12 + 30 = 42, so 1,042.50 in all", "1042.5"),
        ("number", "it costs $1,800.00", "1800"),
        ("number", "-3 or .5", "0.5"),
        ("number", "a-3", "3"),
        ("number", "It is 7.", "7"),
        ("number", "none at all", None),
        ("exact", "  two \n words ", "two words"),
        ("exact", " \n", None),
        (r"regex:Answer: (\w+)", "Answer: no. Answer: yes.", "yes"),
        (r"regex:\d{1,3}", "from 1 to 234", "234"),
        (r"regex:(a)?b", "b", None),
    ],
)
def test_what_is_read(name, text, result):
    assert find_verifier(name).read(text) == result


def test_a_pattern_s_truth_is_what_is_stated_or_what_the_right_answer_gives():
    verifier = find_verifier(r"regex:Answer: (\w+)")
    assert verifier.truth("yes", "Answer: no") == "yes"
    assert verifier.truth("Answer: maybe", "Answer: no") == "maybe"
    assert verifier.truth(None, "Answer: no") == "no"
    assert verifier.truth(None, "no mark") is None
    assert verifier.judge("I think. Answer: no", "no") == 1.0
    assert verifier.judge("I think. Answer: yes", "no") == verifier.judge("no mark", "no") == 0.0


MODULE = """
def near(answer, truth, prompt):
    return 1 - min(1, abs(int(answer) - int(truth)) / 10)

def prompted(answer, truth, prompt):
    return answer in prompt

def words(answer, truth, prompt):
    return "yes"

def two(answer, truth):
    return True

number = 3
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own_judges.py").write_text(MODULE)
    (tmp_path / "broken_judges.py").write_text("1 / 0\n")
    (tmp_path / "needy_judges.py").write_text("import no_such_package_at_all\n")
    (tmp_path / "json.py").write_text("def near(answer, truth, prompt):\n    return True\n")
    return tmp_path


def test_a_function_of_the_user_s_by_module_or_file(folder):
    for name in ("own_judges:near", "own_judges.py:near", f"{folder}/own_judges.py:near"):
        verifier = find_verifier(name)
        assert verifier.truth(5, "7") == "5" and verifier.truth(None, "7") == "7"
        assert verifier.judge("8", "5") == pytest.approx(0.7)
    assert find_verifier("own_judges:prompted").judge("b", "", "abc") == 1.0
    assert find_verifier("json.py:near").judge("", "", "") == 1.0  # not the library's


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("arithmetc", "is arithmetic meant"),
        ("no_such_module:f", "there is no module no_such_module"),
        ("no_such_file.py:f", "there is no file"),
        ("own_judges:nea", "near, prompted, two, words"),
        ("own_judges:number", "has no function number"),
        ("own_judges:two", "answer, truth, prompt"),
        (":f", "module:function"),
        ("broken_judges:f", "ZeroDivisionError"),
        ("needy_judges:f", "needs no_such_package_at_all"),
        ("regex:(", "no regular expression"),
        ("regex:", "no pattern"),
    ],
)
def test_what_is_wrong_with_a_name_is_told_in_one_line(folder, name, told):
    with pytest.raises(DataError, match=told) as error:
        find_verifier(name)
    assert "\n" not in str(error.value)


def test_a_function_that_fails_or_says_nothing_usable_is_told_with_the_answer(folder):
    with pytest.raises(DataError, match="own_judges:near failed on the answer 'eight': ValueError"):
        find_verifier("own_judges:near").judge("eight", "5")
    with pytest.raises(DataError, match="said 'yes'"):
        find_verifier("own_judges:words").judge("8", "5")
    for said, told in ((lambda *_: 10**400, "it must say True"), (lambda *_: sys.exit(0), "SystemExit")):
        with pytest.raises(DataError, match=told):
            FunctionVerifier("mine", said).judge("8", "5")


def test_commas_part_names_but_not_patterns():
    assert split_names("gsm8k, exact") == ["gsm8k", "exact"]
    assert split_names(r"regex:\d{1,3},gsm8k,own.judges:near,f.py:g") == [
        r"regex:\d{1,3}",
        "gsm8k",
        "own.judges:near",
        "f.py:g",
    ]
    assert set(VERIFIERS) == {"arithmetic", "gsm8k", "number", "exact"}
