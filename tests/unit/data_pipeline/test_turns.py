"""Texts that write their turns down with markers: the answer begins behind the assistant's, not where texts part."""

import pytest

from data_pipeline.records import RecordError
from data_pipeline.sources.formats import convert

PROMPTS = (
    "User: hi\n\nAssistant:",
    "\n\nUser: hi\n\nAssistant: Hello.\n\nUser: more\n\nAssistant:",
    "**User:** hi\n\n**Assistant:**",
    "### Human: hi### Assistant:",
    "Below is an instruction.\n\n### Instruction:\nhi\n\n### Response:",
    "A chat. USER: hi ASSISTANT:",
    "Q: hi\nA:",
    "问：你好？答：",
    "[INST] hi [/INST]",
    "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n",
    "<|user|>\nhi\n<|assistant|>\n",
    "<start_of_turn>user\nhi<end_of_turn>\n<start_of_turn>model\n",
    "<|start_header_id|>user<|end_header_id|>\n\nhi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "<role>HUMAN</role>hi<role>ASSISTANT</role>",
)


@pytest.mark.parametrize("prompt", PROMPTS)
def test_the_first_words_that_answers_share_are_theirs(prompt):
    (record,) = convert({"chosen": prompt + " The answer is 3.", "rejected": prompt + " The answer is 4."})
    assert (record.prompt, record.chosen, record.rejected) == (prompt, " The answer is 3.", " The answer is 4.")


def test_a_word_within_the_answer_begins_no_turn():
    prompt, answer = "User: hi\nAssistant:", " Let us see.\nAnswer: "
    (record,) = convert({"chosen": prompt + answer + "3", "rejected": prompt + answer + "4"})
    assert (record.prompt, record.chosen) == (prompt, answer + "3")


@pytest.mark.parametrize(
    ("chosen", "rejected"),
    [
        ("User: a\nAssistant: one\nUser: b\nAssistant: c", "User: a\nAssistant: two\nUser: b\nAssistant: d"),
        ("Q: hi\nA: b\nQ: c d\nA: e", "Q: hi\nA: b\nQ: c f\nA: g"),  # they part within the question
    ],
)
def test_answers_to_other_turns_are_counted(chosen, rejected):
    with pytest.raises(RecordError) as error:
        list(convert({"chosen": chosen, "rejected": rejected}))
    assert error.value.kind == "not_one_answer"
