"""Each layout of the field → the record it means."""

from collections import Counter

import pytest

from data_pipeline.errors import DataError
from data_pipeline.records import AnswerRecord, RecordError
from data_pipeline.sources.candidates import Candidate, Pairing, add_long_row, make_pairs
from data_pipeline.sources.formats import convert, detect_format, parse_transcript


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


def one(row, **options):
    (record,) = convert(row, **options)
    return record


def sides(record):
    return record.prompt, record.chosen, record.rejected


HH = "\n\nHuman: a\n\nAssistant:"
CONVERSATION = ((user("q"),), (assistant("a"),), (assistant("b"),))


@pytest.mark.parametrize(
    ("format", "row", "expected"),
    [
        ("preference", {"prompt": "q", "chosen": "a", "rejected": "b"}, ("q", "a", "b")),
        (
            "preference",
            {"prompt": [user("q")], "chosen": [assistant("a")], "rejected": [assistant("b")]},
            CONVERSATION,
        ),
        ("preference", {"prompt": [user("q")], "chosen": "a", "rejected": "b"}, CONVERSATION),
        (  # UltraFeedback-binarized
            "preference",
            {
                "prompt": "q",
                "prompt_id": "77",
                "chosen": [user("q"), assistant("a")],
                "rejected": [user("q"), assistant("b")],
                "messages": [user("q"), assistant("a")],
                "score_chosen": 8.0,
                "score_rejected": 5.0,
            },
            CONVERSATION,
        ),
        (
            "preference",
            {"prompt": [user("q")], "chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
            CONVERSATION,
        ),
        (
            "implicit",
            {"chosen": "The sky is blue.", "rejected": "The sky is green."},
            ("The sky is", " blue.", " green."),
        ),
        ("implicit", {"chosen": "It is bluish", "rejected": "It is blunt"}, ("It is", " bluish", " blunt")),
        ("implicit", {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]}, CONVERSATION),
        ("hh", {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}, CONVERSATION),
        ("hh", {"prompt": "\n\nHuman: q\n\nAssistant:", "chosen": " a", "rejected": " b"}, CONVERSATION),
    ],
)
def test_pairs(format, row, expected):
    assert detect_format(row) == format
    assert sides(one(row)) == expected
    assert sides(one(row, format=format)) == expected


def test_scores_are_kept():
    row = {"prompt": "q", "chosen": [assistant("a")], "rejected": [assistant("b")], "score_chosen": 8.0}
    assert one(row).meta == {"score_chosen": 8.0}


def test_hh_answers_that_begin_alike_keep_their_beginning():
    """The longest common prefix would put 'I had' into the prompt."""
    start = "\n\nHuman: hi\n\nAssistant: yes?\n\nHuman: and you\n\nAssistant: "
    record = one({"chosen": start + "I had a lot", "rejected": start + "I had none"})
    assert record.prompt == (user("hi"), assistant("yes?"), user("and you"))
    assert record.chosen == (assistant("I had a lot"),)
    assert record.rejected == (assistant("I had none"),)


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        (
            {"chosen": "\n\nHuman: a\n\nAssistant: b\n\nHuman: c", "rejected": "\n\nHuman: a\n\nAssistant: d"},
            "not_one_answer",
        ),
        ({"chosen": "\n\nAssistant: b", "rejected": "\n\nAssistant: c"}, "prompt_without_question"),
        ({"chosen": HH + " b", "rejected": "words"}, "not_a_transcript"),
        ({"chosen": [user("q"), assistant("a")], "rejected": [user("p"), assistant("b")]}, "not_one_answer"),
        ({"chosen": "blue", "rejected": "green"}, "no_prompt"),
        ({"prompt": "q", "chosen": "a", "rejected": [assistant("b")]}, "wrong_type"),
        ({"prompt": "q", "chosen": "a"}, "missing_field"),
        ({"prompt": "q", "text": "a"}, "missing_field"),
        ({"instruction": "q"}, "missing_field"),
        ({"prompt": "q", "completion": "a", "label": "maybe"}, "wrong_type"),
        ({"messages": [user("q")]}, "not_one_answer"),
    ],
)
def test_refused(row, kind):
    with pytest.raises(RecordError) as error:
        list(convert(row))
    assert error.value.kind == kind


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "completion": "a", "label": False}, ("q", "a", False)),
        ({"prompt": "q", "completion": "a", "is_correct": False}, ("q", "a", False)),
        ({"question": "q", "answer": "a", "correct": "yes"}, ("q", "a", True)),
        ({"prompt": "q", "completion": "a", "label": True, "is_correct": False}, ("q", "a", True)),
        ({"messages": [user("q"), assistant("a")], "is_correct": 0}, ((user("q"),), (assistant("a"),), False)),
        ({"prompt": [user("q")], "completion": [assistant("a")], "label": 1}, ((user("q"),), (assistant("a"),), True)),
        ({"prompt": "q", "completion": "a"}, ("q", "a", True)),
        ({"question": "q", "answer": "a"}, ("q", "a", True)),
        ({"messages": [user("q"), assistant("a")]}, ((user("q"),), (assistant("a"),), True)),
        ({"prompt": "q", "completion": [assistant("a")]}, ((user("q"),), (assistant("a"),), True)),
        ({"prompt": [user("q")], "completion": "a"}, ((user("q"),), (assistant("a"),), True)),
    ],
)
def test_single_answers(row, expected):
    record = one(row)
    assert isinstance(record, AnswerRecord)
    assert (record.prompt, record.answer, record.label) == expected


LAYOUTS = [
    {"question": "q", "candidates": ["r1", "w1", "r2 long"], "correct": [True, False, 1]},
    {"prompt": "q", "responses": [{"text": t, "is_correct": c} for t, c in (("r1", 1), ("w1", 0), ("r2 long", 1))]},
    {
        "question": "q",
        "ground_truth": "gold",
        "6b": {"solution": "r1", "is_correct": True},
        "175b": {"solution": "w1", "is_correct": False},
        "175b_verification": {"solution": "r2 long", "is_correct": True},
    },
]


@pytest.mark.parametrize("row", LAYOUTS)
def test_candidates(row):
    assert detect_format(row) == "candidates"
    everything = {(r.prompt, r.chosen, r.rejected) for r in convert(row, pairing=Pairing("all"))}
    assert everything == {("q", "r1", "w1"), ("q", "r2 long", "w1")}
    assert [r.chosen for r in convert(row)] == ["r1"]  # matched: the closest in length, each answer once
    with_gold = {r.chosen for r in convert(row, pairing=Pairing("all", use_reference=True))}
    assert with_gold == {"r1", "r2 long"} | ({"gold"} if "ground_truth" in row else set())


def test_pairing_policies():
    right = [Candidate(c * n, True) for c, n in (("a", 2), ("b", 10), ("c", 10))]
    wrong = [Candidate(c * n, False) for c, n in (("x", 11), ("y", 3))]
    text = [(a.text, b.text) for a, b in make_pairs([*right, *wrong], Pairing("matched"))]
    assert text == [("aa", "yyy"), ("b" * 10, "x" * 11)]
    assert len(make_pairs([*right, *wrong], Pairing("all"))) == 6
    assert len(make_pairs([*right, *wrong], Pairing("all", max_pairs=4))) == 4
    assert len(make_pairs([*right, *wrong], Pairing("one"))) == 1
    assert make_pairs([*right, *right, *wrong], Pairing("all")) == make_pairs([*right, *wrong], Pairing("all"))
    with pytest.raises(DataError, match="matched, all, one"):
        Pairing("best")


def test_no_contrast():
    with pytest.raises(RecordError) as error:
        list(convert({"question": "q", "candidates": ["a", "b"], "correct": [True, True]}))
    assert error.value.kind == "no_contrast"
    with pytest.raises(RecordError) as error:
        list(convert({"question": "q", "candidates": ["a", "b"], "correct": [True]}))
    assert error.value.malformed


def test_long_rows_are_gathered_by_question():
    rows = [
        {"question": "q", "answer": "r", "is_correct": True},
        {"question": "p", "answer": "v", "is_correct": False},
        {"question": "q", "answer": "w", "is_correct": False},
    ]
    groups: dict[str, dict] = {}
    for row in rows:
        add_long_row(groups, row)
    first, second = groups.values()
    (record,) = convert(first)
    assert sides(record) == ("q", "r", "w")
    assert second["question"] == "p"


def test_transcript_turns():
    text = "\n\nHuman: a\nb\n\nAssistant: c\n\nHuman: d"
    assert parse_transcript(text) == (user("a\nb"), assistant("c"), user("d"))


@pytest.mark.parametrize("name", ["answer", "unpaired"])
def test_a_wrong_answer_is_never_stored_as_a_good_one(name):
    row = {"prompt": "q", "completion": "a", "is_correct": False}
    assert next(convert(row, format=name)).label is False
    with pytest.raises(RecordError, match="is_correct 'perhaps' is not true or false"):
        next(convert(row | {"is_correct": "perhaps"}, format=name))


SOUP = ("Human: Hi, what did you eat?", "Assistant: I had a lot of soup.", "Assistant: I had none of it.")


@pytest.mark.parametrize("before", ["", "\n\n", "\n", " \n\n"])
def test_transcripts_whose_beginning_was_stripped(before):
    rows = [
        {"chosen": f"{before}{SOUP[0]}\n\n{SOUP[1]}", "rejected": f"{before}{SOUP[0]}\n\n{SOUP[2]}"},
        {
            "prompt": f"{before}{SOUP[0]}\n\nAssistant:",
            "chosen": " I had a lot of soup.",
            "rejected": " I had none of it.",
        },
    ]
    for row in rows:
        assert detect_format(row) == "hh"
        record = one(row)
        assert record.prompt == (user("Hi, what did you eat?"),)
        assert record.chosen == (assistant("I had a lot of soup."),)
        assert record.rejected == (assistant("I had none of it."),)


def test_turns_that_cannot_be_told_are_not_split_by_characters():
    with pytest.raises(RecordError) as error:
        list(convert({"chosen": f"{SOUP[0]}\n{SOUP[1]}", "rejected": f"{SOUP[0]}\n{SOUP[2]}"}))
    assert error.value.kind == "not_one_answer"
    record = one({"prompt": "Human: hi\nAssistant:", "chosen": " a", "rejected": " b"})
    assert (record.prompt, record.chosen) == ("Human: hi\nAssistant:", " a")  # a prompt of somebody's own


def test_whole_transcripts_beside_a_prompt_that_they_repeat():
    sides = {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"}
    for prompt in ("q", "\n\nHuman: q\n\nAssistant:"):
        (record,) = convert({"prompt": prompt, **sides})
        assert (record.prompt, record.chosen) == ((user("q"),), (assistant("a"),))
    with pytest.raises(RecordError) as error:
        list(convert({"prompt": "another", **sides}))
    assert error.value.kind == "ambiguous_prompt"


def test_a_transcript_that_ends_within_the_answer_is_continued():
    (record,) = convert({"prompt": "\n\nHuman: q\n\nAssistant: Sure, ", "chosen": "yes", "rejected": " no"})
    assert record.prompt == (user("q"), assistant("Sure, ")) and record.rejected == (assistant(" no"),)


def test_answers_that_begin_with_the_prompt_are_told():
    rows = [
        {"prompt": "What is 2+3?", "chosen": "What is 2+3? 5", "rejected": "What is 2+3? 6"},
        {"prompt": [user("q"), assistant("The sum is")], "chosen": "The sum is 5", "rejected": "The sum is 6"},
    ]
    for row in rows:
        told = Counter()
        list(convert(row, told=told))
        assert list(told.values()) == [1] and "words of the prompt" in next(iter(told))
    told = Counter()
    list(convert({"prompt": [user("q"), assistant("A")], "chosen": "A sum", "rejected": "A tree"}, told=told))
    assert not told
