"""Turns in all the ways they are written down; text that looks like turns is never text."""

import json
from collections import Counter

import pytest

from data_pipeline.records import RecordError, user_turn
from data_pipeline.sources.messages import read_text

HI = user_turn("hi")
CALL = {"type": "function", "function": {"name": "f", "arguments": {"a": 1}}}


@pytest.mark.parametrize(
    "value",
    [
        [{"role": "user", "content": "hi"}],
        {"role": "user", "content": "hi"},
        {"messages": [{"role": "user", "content": "hi"}]},
        {"role": ["user"], "content": ["hi"]},
        [{"from": "human", "value": "hi"}],
        {"from": "user", "value": "hi"},
        [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        [{"role": "user", "content": [{"type": "input_text", "text": "h"}, {"type": "text", "text": "i"}]}],
        [{"role": "user", "content": ["hi"]}],
        [{"role": "user", "content": [{"type": "text", "text": "hi", "image_url": None}], "tool_calls": None}],
        '[{"role": "user", "content": "hi"}]',
        '{"role": "user", "content": "hi"}',
        "[{'role': 'user', 'content': 'hi'}]",
        "  [{'content': 'hi', 'role': 'user'}]\n",
        "[{'from': 'human', 'value': \"hi\"}]",
    ],
)
def test_turns(value):
    assert read_text(value, "prompt") == HI


@pytest.mark.parametrize(
    "text", ["hi", "[1, 2]", "{'a': 1}", '{"role": "user"}', "[]", "[see above]", "{x}", "[{'a': 1}]", "array of 3"]
)
def test_other_text_is_text(text):
    assert read_text(text, "chosen") == text


@pytest.mark.parametrize(
    "text",
    [
        "[{'content': 'hi', 'role': 'user'}\n {'content': 'ho', 'role': 'assistant'}]",  # as numpy prints it
        "array([{'content': 'hi', 'role': 'user'}], dtype=object)",
        "[{'role': 'user', 'content': 'hi'}, ...]",
        "[{'role': 'user', 'content': 'hi",
        "[Message(role='user', content='hi')]",
        "{'role': 'user', 'content': it's}",
        "[{'weight': 1, 'role': 'user', 'content': 'hi'}\n {'weight': 0, 'role': 'assistant', 'content': 'ho'}]",
        "[OrderedDict([('role', 'user'), ('content', 'hi')])]",
        "[{'role': 'user', 'content': 'hi', 'name': nan}]",
        "[{'id': 5, 'from': 'human', 'value': array(['hi'], dtype=object)}]",
    ],
)
def test_what_python_printed_and_cannot_be_read_back_is_refused(text):
    with pytest.raises(RecordError, match="as Python prints it") as error:
        read_text(text, "chosen")
    assert error.value.kind == "printed_list" and error.value.malformed


@pytest.mark.parametrize(
    ("value", "kind"),
    [
        (3, "wrong_type"),
        (["hi"], "wrong_type"),
        ([{"role": "user"}], "wrong_type"),
        ([{"role": "user", "content": None}], "wrong_type"),
        ([{"role": "user", "content": 3}], "wrong_type"),
        ([{"speaker": "user", "text": "hi"}], "wrong_type"),
        ([{"role": 1, "content": "hi"}], "wrong_type"),
        ({"text": "hi"}, "wrong_type"),
        ([{"from": "function_call", "value": "f(1)"}], "wrong_type"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}], "not_text"),
        ([{"role": "user", "content": "hi", "images": ["x"]}], "not_text"),
    ],
)
def test_what_are_no_turns(value, kind):
    with pytest.raises(RecordError) as error:
        read_text(value, "prompt")
    assert error.value.kind == kind


def test_what_a_turn_says_beside_its_content_is_kept():
    (turn,) = read_text([{"role": "assistant", "content": None, "tool_calls": [CALL], "refusal": None}], "prompt")
    assert turn == {"role": "assistant", "content": "", "tool_calls": [CALL]}
    (thought,) = read_text({"role": "assistant", "content": "5", "reasoning_content": "2+3"}, "chosen")
    assert thought["reasoning_content"] == "2+3"
    called, answered = read_text(
        [
            {"from": "function_call", "value": '{"name": "f", "arguments": {"a": 1}}'},
            {"from": "observation", "value": "1"},
        ],
        "prompt",
    )
    assert called == turn and answered == {"role": "tool", "content": "1"}


def test_nulls_that_a_table_fills_in_are_absent():
    filled = {"type": "function", "function": {"name": "f", "arguments": {"a": 1, "b": None}}, "id": None}
    (turn,) = read_text([{"role": "assistant", "content": "", "tool_calls": [filled]}], "prompt")
    assert turn["tool_calls"] == [CALL]


def test_keys_of_turns_that_nobody_reads_are_counted():
    unread = Counter()
    read_text(json.dumps([{"role": "user", "content": "hi", "weight": 1, "end": None}] * 2), "prompt", unread)
    assert unread == {"weight (of a turn)": 2}
    unread.clear()
    read_text([{"role": "user", "content": "hi", "weight": 0, "train": False, "end": ""}], "prompt", unread)
    assert unread == {"weight (of a turn)": 1, "train (of a turn)": 1}


@pytest.mark.parametrize(
    ("written", "read"),
    [("Human", "user"), ("USER", "user"), ("GPT", "assistant"), ("Assistant ", "assistant"), ("AI", "assistant")],
)
def test_roles_in_any_letters(written, read):
    assert read_text([{"role": written, "content": "hi"}], "prompt")[0]["role"] == read
    assert read_text([{"from": "Narrator", "value": "hi"}], "prompt")[0]["role"] == "Narrator"


@pytest.mark.parametrize(
    ("turn", "kind"),
    [
        ({"role": "user", "content": "hi", "value": "ho"}, "wrong_type"),
        ({"role": "user", "from": "gpt", "content": "hi"}, "wrong_type"),
        ({"role": " ", "content": "hi"}, "wrong_type"),
        ({"role": "user", "content": [{"image": "x", "text": "hi"}]}, "not_text"),
        ({"role": "system", "content": "hi", "tools": [CALL]}, "unknown_column"),
        ({"role": "assistant", "content": "", "tool_calls": "f(1)"}, "wrong_type"),
        ({"role": "assistant", "content": "", "tool_calls": ["f"]}, "wrong_type"),
        ({"role": "assistant", "content": "hi", "reasoning_content": ["ho"]}, "wrong_type"),
    ],
)
def test_turns_that_say_two_things_or_what_no_template_reads(turn, kind):
    with pytest.raises(RecordError) as error:
        read_text([turn], "prompt")
    assert error.value.kind == kind


@pytest.mark.parametrize("calls", [[CALL], CALL, json.dumps([CALL]), str([CALL])])
def test_calls_of_tools_are_a_list(calls):
    assert read_text([{"role": "assistant", "content": None, "tool_calls": calls}], "prompt")[0]["tool_calls"] == [CALL]
    both = [{"role": "user", "from": "human", "content": "hi", "value": "hi"}]  # what one of two layouts repeats
    assert read_text(both, "prompt") == HI


def test_turns_by_columns_as_the_library_datasets_keeps_sequences():
    by_columns = {"from": ["human", "gpt"], "value": ["hi", "ho"]}
    assert [turn["role"] for turn in read_text(by_columns, "conversations")] == ["user", "assistant"]
    with pytest.raises(RecordError, match="not equally long"):
        read_text({"from": ["human", "gpt"], "value": ["hi"]}, "conversations")


@pytest.mark.parametrize(
    ("turn", "found"),
    [
        ({"role": "user", "text": "hi"}, "'role', 'text'"),
        ({"role": "user", "parts": [{"text": "hi"}]}, "'role', 'parts'"),
        ("hi", "str; of a list of texts take one"),
        ({"role": "user", "content": None}, "content is null"),
    ],
)
def test_a_message_that_is_none_is_told_by_what_it_holds(turn, found):
    with pytest.raises(RecordError, match=found):
        read_text([turn], "prompt")
