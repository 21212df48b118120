"""Records survive storage; what is no record is refused with a kind."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data_pipeline.records import (
    AnswerRecord,
    PreferenceRecord,
    RecordError,
    as_label,
    assistant_turn,
    check,
    content_hash,
    decode_record,
    encode_record,
    is_empty,
    parse_json,
    prompt_hash,
    user_turn,
)

words = st.text(st.characters(exclude_categories=["Cs"]), min_size=1).filter(lambda text: not is_empty(text))
turns = st.lists(
    st.builds(lambda role, content: {"role": role, "content": content}, st.sampled_from(["user", "assistant"]), words),
    min_size=1,
    max_size=3,
).map(tuple)


@given(st.text(st.characters(exclude_categories=["Cs"]), min_size=1), words | turns, words, words)
def test_stored_and_read_back(name, prompt, one, other):
    pair = PreferenceRecord(name, prompt, one + "1", other + "2", {"source": "x"})
    assert decode_record(encode_record(pair)) == pair
    answer = AnswerRecord(name, prompt, one, False, {})
    assert decode_record(encode_record(answer)) == answer


PAIR = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("change", "kind"),
    [
        ({"prompt": None}, "missing_field"),
        ({"chosen": None}, "missing_field"),
        ({"rejected": 3}, "wrong_type"),
        ({"rejected": [{"role": "assistant"}]}, "wrong_type"),
        ({"meta": [1]}, "wrong_type"),
        ({"id": 1.5}, "wrong_type"),
        ({"prompt": " \n"}, "empty_prompt"),
        ({"chosen": ""}, "empty_chosen"),
        ({"rejected": [{"role": "assistant", "content": " "}]}, "empty_rejected"),
        ({"rejected": " a "}, "chosen_equals_rejected"),
        ({"rejected": "\ud800"}, "invalid_unicode"),
    ],
)
def test_unusable(change, kind):
    with pytest.raises(RecordError) as error:
        decode_record(json.dumps(PAIR | change).encode())
    assert error.value.kind == kind


def test_a_label_that_is_null_is_no_label():
    with pytest.raises(RecordError, match="label None is not true or false"):
        decode_record(b'{"prompt": "q", "answer": "a", "label": null}')


@pytest.mark.parametrize("raw", [b"{", b"[1]", b"\xff\xfe\x00", b"nul", b"[" * 100_000])
def test_not_json_objects(raw):
    with pytest.raises(RecordError) as error:
        decode_record(raw)
    assert error.value.kind in ("invalid_json", "wrong_type")
    assert error.value.malformed


def test_the_missing_field_is_named_with_those_found():
    with pytest.raises(RecordError, match=r"missing field 'rejected' \(fields found: 'prompt', 'chosen'\)"):
        decode_record(b'{"prompt": "q", "chosen": "a"}')


def test_id_is_given_or_of_the_content():
    assert decode_record(json.dumps(PAIR | {"id": 7}).encode()).id == "7"
    first, again = (decode_record(json.dumps(PAIR | extra).encode()) for extra in ({}, {"meta": {"source": "s"}}))
    assert first.id == again.id == f"{content_hash(first):016x}"
    other = decode_record(json.dumps(PAIR | {"rejected": "c"}).encode())
    assert other.id != first.id
    assert prompt_hash(other) == prompt_hash(first)


def test_a_question_is_one_prompt_as_text_and_as_turn():
    text, turn = PreferenceRecord("", " q\n", "a", "b"), PreferenceRecord("", user_turn("q"), "a", "b")
    assert prompt_hash(text) == prompt_hash(turn)
    assert content_hash(text) != content_hash(turn)


@pytest.mark.parametrize("value", [True, 1, "true", "Yes", "1", 1.0])
def test_labels(value):
    assert as_label(value) is True
    with pytest.raises(RecordError):
        as_label("perhaps")
    with pytest.raises(RecordError):
        as_label([1])


@pytest.mark.parametrize("text", [" ", "\u3000\n", "\u200b", "\ufeff", "\x00", "\u200d\u2060"])
def test_an_answer_without_a_visible_sign_is_empty(text):
    with pytest.raises(RecordError) as error:
        check(PreferenceRecord("x", "q", "a", text))
    assert error.value.kind == "empty_rejected"


def test_answers_that_differ_in_blanks_around_them_are_equal():
    for chosen, rejected in (("a", " a\n"), (assistant_turn("a"), assistant_turn("a "))):
        with pytest.raises(RecordError) as error:
            check(PreferenceRecord("x", "q", chosen, rejected))
        assert error.value.kind == "chosen_equals_rejected"


@pytest.mark.parametrize(
    "record",
    [
        PreferenceRecord("x", user_turn("q"), "a", "b", {}, {"tools": [{"name": "\ud83d"}]}),
        PreferenceRecord("x", ({"role": "\ud83d", "content": "q"},), "a", "b"),
        AnswerRecord("\ud83d", "q", "a"),
    ],
)
def test_half_a_surrogate_pair_anywhere(record):
    with pytest.raises(RecordError) as error:
        check(record)
    assert error.value.kind == "invalid_unicode"


def test_a_name_twice_in_one_object_is_no_json_to_guess_at():
    for raw in ('{"prompt": "a", "prompt": "b"}', b'{"meta": {"x": 1, "x": 1}}'):
        with pytest.raises(RecordError) as error:
            parse_json(raw)
        assert error.value.kind == "repeated_key" and error.value.malformed
