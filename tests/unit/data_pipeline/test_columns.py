"""Which columns are read as what; what could be the prompt and is not read is never left out in silence."""

from collections import Counter

import pytest

from data_pipeline.errors import DataError
from data_pipeline.records import AnswerRecord, RecordError, assistant_turn, user_turn
from data_pipeline.sources.columns import parse_columns
from data_pipeline.sources.formats import convert

PAIR = {"chosen": "The sum is 5.", "rejected": "The sum is 6."}
TURNS = {"chosen": [*user_turn("2+3?"), *assistant_turn("5")], "rejected": [*user_turn("2+3?"), *assistant_turn("6")]}
SFT = {"prompt": "2+3?", "completion": "5"}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}


def one(row, **options):
    (record,) = convert(row, **options)
    return record


def refused(row, **options):
    with pytest.raises(RecordError) as error:
        list(convert(row, **options))
    return error.value


def turns(*said):
    return tuple({"role": role, "content": content} for role, content in said)


@pytest.mark.parametrize(
    ("asked", "prompt"),
    [
        ({"question": "2+3?"}, "2+3?"),
        ({"query": "2+3?"}, "2+3?"),
        ({"input": "2+3?"}, "2+3?"),
        ({"instruction": "Add."}, "Add."),
        ({"instruction": "Add.", "input": "2 and 3"}, "Add.\n\n2 and 3"),
        ({"instruction": "Add.", "input": ""}, "Add."),
        ({"prompt": None, "question": "2+3?"}, "2+3?"),
        ({"prompt": float("nan"), "question": "2+3?"}, "2+3?"),
        ({"system": "Be kind.", "question": "2+3?"}, turns(("system", "Be kind."), ("user", "2+3?"))),
        ({"system_prompt": "Be kind.", "prompt": "2+3?"}, turns(("system", "Be kind."), ("user", "2+3?"))),
        ({"system": "", "prompt": "2+3?"}, "2+3?"),
        (
            {"history": [["hi", "hello"]], "query": "2+3?"},
            turns(("user", "hi"), ("assistant", "hello"), ("user", "2+3?")),
        ),
        ({"history": [], "query": "2+3?"}, "2+3?"),
        ({"messages": [{"role": "user", "content": "2+3?"}]}, turns(("user", "2+3?"))),
        ({"conversations": [{"from": "human", "value": "2+3?"}]}, turns(("user", "2+3?"))),
        (
            {"system": "S", "conversation": [{"role": "user", "content": "2+3?"}]},
            turns(("system", "S"), ("user", "2+3?")),
        ),
    ],
)
def test_prompts_by_the_names_of_the_field(asked, prompt):
    record = one(PAIR | asked)
    assert record.prompt == prompt
    expected = [assistant_turn(text) if isinstance(prompt, tuple) else text for text in PAIR.values()]
    assert [record.chosen, record.rejected] == expected
    single = one(asked | {"completion": "5", "label": False})
    assert isinstance(single, AnswerRecord) and single.prompt == prompt and single.label is False


@pytest.mark.parametrize(
    "others",
    [{"user_ask": "2+3?"}, {"text": ["2+3?"]}, {"context": "2 and 3"}, {"system": "Add."}, {"src": "2", "n": 1}],
)
def test_a_prompt_is_split_from_texts_only_where_no_other_column_can_hold_it(others):
    error = refused(PAIR | others)
    assert error.kind == "unknown_prompt" and error.malformed
    assert all(repr(name) in str(error) for name in (*PAIR, *others)), "the columns found are named"
    split = one(PAIR | others, format="implicit").chosen
    assert split == (assistant_turn(" 5.") if "system" in others else " 5."), "unless the user says so"
    told = Counter()
    assert next(convert(PAIR | {"score": 3, "id": "a", "source": "b"}, told=told)).chosen == " 5."
    assert told == {"column 'score'": 1, "prompt split from the answers' common beginning": 1}


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Translate this.", "input": "Hallo Welt", **PAIR},
        {"prompt": "Add.", "question": "2+3?", **PAIR},
        {"question": "Who?", "context": "Anna came home.", **PAIR},
        {"prompt": "Add.", "messages": [{"role": "user", "content": "2+3?"}], **PAIR},
        {"context": "2 and 3", **TURNS},
        {"question": "Who?", "context": "Anna came home.", "answer": "Anna"},
        {"context": "x", "chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
    ],
)
def test_two_columns_that_could_be_the_prompt_are_refused(row):
    error = refused(row)
    assert error.kind == "ambiguous_prompt" and error.malformed and "--columns prompt=" in str(error)
    if row.keys() >= TURNS.keys() and isinstance(row["chosen"], list):
        return
    mapped = one(row, columns=parse_columns("prompt=context" if "context" in row else "prompt=prompt"))
    assert mapped.prompt in (row.get("context"), row.get("prompt"), user_turn(row.get("context")))


def test_a_column_that_repeats_the_prompt_is_no_rival():
    row = {"prompt": "Question: What is 2+3?\nAnswer:", "question": "What is 2+3?", **PAIR}
    assert one(row).prompt == row["prompt"]
    whole = {"prompt": "2+3?", "messages": TURNS["chosen"], "prompt_id": "7", **TURNS}
    assert one(whole).prompt == user_turn("2+3?")
    supervised = {"prompt": "2+3?", "messages": TURNS["chosen"]}
    assert one(supervised).answer == assistant_turn("5")


def test_conversations_keep_the_systems_turn_of_a_column():
    record = one({"system": "Add.", **TURNS})
    assert record.prompt == turns(("system", "Add."), ("user", "2+3?"))
    same = {name: [{"role": "system", "content": "Add."}, *side] for name, side in TURNS.items()}
    assert one({"system": "Add.", **same}).prompt == record.prompt
    assert refused({"system": "Subtract.", **same}).kind == "ambiguous_prompt"


@pytest.mark.parametrize(
    "row", [{"steps": ["a", "b"], "labels": [1, 0]}, {"completions": ["a", "b"], "labels": [1, 0]}]
)
def test_steps_are_not_rivals(row):
    error = refused({"prompt": "1+1+1?", **row})
    assert error.kind == "stepwise_supervision" and error.malformed
    if "completions" in row:
        assert one({"prompt": "1+1+1?", **row}, format="candidates").chosen == "a"
        assert one({"prompt": "q", "completions": row["completions"], "is_correct": [1, 0]}).rejected == "b"


def test_what_the_template_is_given():
    row = {"prompt": [*user_turn("2+3?")], "tools": [TOOL], "chat_template_kwargs": {"enable_thinking": False}, **PAIR}
    record = one(row)
    assert record.template_kwargs == {"enable_thinking": False, "tools": [TOOL]}
    assert one(row | {"tools": '[{"type": "function", "function": {"name": "add", "parameters": {}}}]'}) == record
    assert record.id != one({name: row[name] for name in ("prompt", *PAIR)}).id, "it is a part of what is learned"
    assert refused(row | {"tools": "add(a, b)"}).kind == "wrong_type"


@pytest.mark.parametrize("media", [{"images": ["a.png"]}, {"image": {"bytes": "x"}}, {"videos": ["a"]}, {"audio": "a"}])
def test_other_media_are_refused(media):
    assert refused({"prompt": "q", **PAIR, **media}).kind == "not_text"
    assert one({"prompt": "q", **PAIR, **dict.fromkeys(media)}).prompt == "q"
    assert one({"prompt": "q", **PAIR, **dict.fromkeys(media, "[]")}).prompt == "q"


def test_pairs_of_other_programs():
    expected = (user_turn("2+3?"), assistant_turn("5"), assistant_turn("6"))
    swift = {"messages": TURNS["chosen"], "rejected_response": "6"}
    openai = {
        "input": {"messages": [*user_turn("2+3?")], "tools": [], "parallel_tool_calls": True},
        "preferred_output": [*assistant_turn("5")],
        "non_preferred_output": [*assistant_turn("6")],
    }
    sharegpt = {
        "conversations": [{"from": "human", "value": "2+3?"}],
        "chosen": {"from": "gpt", "value": "5"},
        "rejected": {"from": "gpt", "value": "6"},
    }
    for row in (swift, openai, sharegpt):
        record = one(row)
        assert (record.prompt, record.chosen, record.rejected) == expected
    both = one({"messages": TURNS["chosen"], "rejected_messages": TURNS["rejected"]})
    assert (both.prompt, both.chosen, both.rejected) == expected
    old = one({"query": "2+3?", "response": "5", "rejected_response": "6"})
    assert (old.prompt, old.chosen, old.rejected) == ("2+3?", "5", "6")
    assert refused({"messages": TURNS["chosen"][:1], "rejected_response": "6"}).kind == "not_one_answer"
    alpaca = one({"instruction": "Add.", "input": "2 and 3", "output": "5"})
    assert (alpaca.prompt, alpaca.answer, alpaca.label) == ("Add.\n\n2 and 3", "5", True)


def test_an_answer_within_the_turns_is_no_part_of_the_prompt():
    row = {"messages": TURNS["chosen"], "chosen": "5", "rejected": "6"}
    assert one(row).prompt == user_turn("2+3?")
    assert one(row | {"chosen": [*assistant_turn("5")], "rejected": [*assistant_turn("6")]}).prompt == user_turn("2+3?")
    assert refused(row | {"chosen": "7"}).kind == "ambiguous_prompt"
    goes_on = one(row | {"chosen": "7"}, columns=parse_columns("prompt=messages"))
    assert goes_on.prompt == (*user_turn("2+3?"), *assistant_turn("5"))


@pytest.mark.parametrize(
    "other",
    [
        *({"rejected_answer": "6"}, {"Preferred": ["6"]}, {"is_good": False}, {"thumbs_up": True}, {"my_label": True}),
        *({"is_safe": False}, {"toxic": 1}, {"is_chosen": False}, {"upvoted": "no"}, {"passed": 0}),
    ],
)
def test_what_may_be_the_other_side_of_a_single_answer_is_not_passed_over(other):
    error = refused({"prompt": "2+3?", "completion": "5", **other})
    assert error.kind == "unknown_column" and repr(next(iter(other))) in str(error)
    assert ("a column 'label'" if "toxic" in other else "--columns") in str(error), "a fault is no label"
    assert one({"prompt": "2+3?", "completion": "5", **dict.fromkeys(other)}).label is True
    assert one({"prompt": "2+3?", "completion": "5", "kto_tag": False}).label is False


def test_functions_are_tools_as_they_were_written_before():
    record = one({"prompt": [*user_turn("q")], "functions": [TOOL["function"]], **PAIR})
    assert record.template_kwargs == {"tools": [TOOL]}


def test_mapping_any_layout():
    row = {"ask": "2+3?", "persona": "Be kind.", "good": "5", "bad": "6", "n": 1, "prompt": "x", "about": "sums"}
    text = "prompt=ask,system=persona,chosen=good,rejected=bad"
    told = Counter()
    record = next(convert(row, columns=parse_columns(text), told=told))
    assert record.prompt == turns(("system", "Be kind."), ("user", "2+3?"))
    assert (record.chosen, record.rejected) == (assistant_turn("5"), assistant_turn("6"))
    assert told == {"column 'n'": 1, "column 'prompt'": 1, "column 'about'": 1}
    given = {"prompt": "ask", "system": "persona", "chosen": "good", "rejected": "bad"}
    assert parse_columns(given) == parse_columns(text) == parse_columns(parse_columns(text))
    joined = one(row, columns=parse_columns("prompt=about+ask,chosen=good,rejected=bad"))
    assert joined.prompt == "sums\n\n2+3?"
    absent = refused({"ask": "q", "good": "a"}, columns=parse_columns("prompt=ask,chosen=good,rejected=bad"))
    assert absent.kind == "missing_field" and "'bad'" in str(absent) and "'ask', 'good'" in str(absent)
    without = one({"ask": "2+3?", "good": "5", "bad": "6"}, columns=parse_columns(text))
    assert without.prompt == "2+3?", "a row without a system's text has no such turn"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("prompt", "give pairs such as"),
        ("prompt=", "give pairs such as"),
        ("=a", "give pairs such as"),
        ("ask=prompt", "'ask'; allowed: chosen, rejected, prompt"),
        ("prompt=a,prompt=b", "names something twice"),
    ],
)
def test_mappings_that_say_nothing(text, message):
    with pytest.raises(DataError, match=message):
        parse_columns(text)


def test_an_empty_or_null_prompt_beside_conversations_is_an_absent_one():
    for prompt in (None, "", []):
        assert one({"prompt": prompt, **TURNS}).prompt == user_turn("2+3?")
    assert refused({"prompt": "", **PAIR}).kind == "empty_prompt"


@pytest.mark.parametrize(
    ("chosen", "rejected", "prompt"),
    [
        ("问：一加一？答：等于二。", "问：一加一？答：不知道。", "问：一加一？答："),
        ("空は何色？青です。", "空は何色？赤です。", "空は何色？"),
        ("The sky: blue", "The sky: green", "The sky:"),
    ],
)
def test_text_without_blanks_is_split_behind_a_full_stop(chosen, rejected, prompt):
    record = one({"chosen": chosen, "rejected": rejected})
    assert (record.prompt, record.prompt + record.chosen) == (prompt, chosen)
    error = refused({"chosen": "空は青い", "rejected": "空は赤い"})
    assert error.kind == "no_prompt" and "--columns prompt=" in str(error)


def test_rows_that_were_stored_are_read_back_as_they_are(make_rows):
    """Shards whose index is lost go through this reader as well."""
    from data_pipeline.records import decode_record, encode_record
    from data_pipeline.sources.formats import RowReader

    rows = [
        *make_rows(3),
        {"prompt": "q", "completion": "a", "label": False},
        {"system": "S", "prompt": "q", "tools": [TOOL], **PAIR},
        {"messages": [*user_turn("q"), *assistant_turn("a")]},
        TURNS,
        {"question": "q", "candidates": ["a", "b"], "correct": [1, 0], "ground_truth": "4"},
    ]
    for row in rows:
        record = one(row)
        assert RowReader()(encode_record(record)) == decode_record(encode_record(record)) == record


@pytest.mark.parametrize("names", [("Prompt", "CHOSEN", "Rejected"), (" prompt", "Chosen ", "rejected")])
def test_known_names_in_capitals_are_known(names):
    record = one(dict(zip(names, ("2+3?", "5", "6"), strict=True)) | {"System Prompt": "Add.", "Source": "x"})
    assert record.prompt == ({"role": "system", "content": "Add."}, *user_turn("2+3?"))


def test_names_that_differ_in_capitals_alone_are_left_to_the_user():
    row = {"Prompt": "2+3?", "PROMPT": "3+4?", **PAIR}
    assert refused(row).kind == "unknown_prompt"
    assert one(row, columns=parse_columns("prompt=PROMPT")).prompt == "3+4?"


@pytest.mark.parametrize(
    "around",
    [
        {"passage": "Anna came home."},
        {"documents": ["Anna came home."]},
        {"choices": ["Anna", "Bert"]},
        {"inputs": "x"},
        {"chat_history": [*user_turn("Hello, I am Anna."), *assistant_turn("Hello, Anna.")]},
        {"prefix": "It was on Monday that"},
        {"initial_reason_steps": "Step 1: who has a key?"},
    ],
)
def test_what_stands_around_a_question_is_not_passed_over(around):
    row = {"question": "Who came home?", **around, **PAIR}
    assert refused(row).kind == "ambiguous_prompt"
    assert one(row, columns=parse_columns("prompt=question")).prompt == "Who came home?"


def test_two_system_columns_say_the_same_or_are_refused():
    row = {"prompt": "2+3?", "system": "Add.", "system_prompt": "Add.", **PAIR}
    assert one(row).prompt[0] == {"role": "system", "content": "Add."}
    assert refused(row | {"system_message": "Be brief."}).kind == "ambiguous_prompt"
    assert refused({"prompt": "2+3?", "system": list(user_turn("hi")), **PAIR}).kind == "wrong_type"


@pytest.mark.parametrize("name", ["tokenize", "add_generation_prompt", "chat_template", "tools"])
def test_arguments_of_the_tokenizer_are_not_the_datas_to_give(name):
    assert refused({"prompt": "2+3?", "chat_template_kwargs": {name: True}, **PAIR}).kind == "wrong_type"


@pytest.mark.parametrize("row", [{"prompt": "q", "completion": "a", "label": None}, {**SFT, "is_correct": None}])
def test_an_answer_whose_label_is_empty_is_not_taken_for_a_good_one(row):
    assert refused(row).malformed


def test_two_columns_that_could_be_the_answer_are_refused():
    row = {"problem": "2+3?", "solution": "2 + 3 = 5", "answer": "5"}
    assert refused(row).kind == "ambiguous_answer"
    assert one(row, columns=parse_columns("answer=solution")).answer == "2 + 3 = 5"
    assert one(row | {"solution": "5"}).answer == "5"


@pytest.mark.parametrize("grade", [True, 0, "Bad", "false"])
def test_a_column_that_may_be_a_label_is_not_passed_over(grade):
    assert refused({**SFT, "is_good": grade}).kind == "unknown_column"
    assert one({**SFT, "stage": 1, "percentage": 0}).label


@pytest.mark.parametrize("images", [[], [None], None, ""])
def test_no_image_is_no_image(images):
    assert one({"prompt": "q", "images": images, **PAIR}).prompt == "q"
    assert refused({"prompt": "q", "image_path": "a.png", **PAIR}).kind == "not_text"


@pytest.mark.parametrize("name", ["picture", "image_base64", "scan"])
def test_a_file_of_a_data_set_is_no_text_whatever_its_columns_name(name):
    value = {"bytes": "abc", "path": None} if name != "image_base64" else "iVBORw0KGgo"
    assert refused({"prompt": "q", name: value, **PAIR}).kind == "not_text"
    assert one({"prompt": "q", name: {"bytes": None, "path": None}, **PAIR}).prompt == "q"


@pytest.mark.parametrize("name", ["reasoning_content", "thinking"])
def test_thoughts_beside_an_answer_are_not_passed_over(name):
    for row in (SFT, {"prompt": "2+3?", **PAIR}):
        error = refused({**row, name: "Two and three."})
        assert error.kind == "unknown_column" and repr(name) in str(error)
        assert one({**row, name: ""}).prompt == "2+3?"
    assert refused({"prompt": "2+3?", **PAIR, "chosen_reasoning": "Two and three."}).kind == "unknown_column"


def test_who_says_that_the_answers_begin_with_the_prompt_is_believed():
    row = {"context": "of a lesson in sums", **TURNS}
    assert refused(row).kind == "ambiguous_prompt"
    assert one(row, format="implicit").prompt == user_turn("2+3?")


def test_capybaras_exchanges_are_turns():
    exchanges = {"conversation": [{"input": "2+3?", "output": "5"}, {"input": "And 3+4?", "output": ""}]}
    prompt = turns(("user", "2+3?"), ("assistant", "5"), ("user", "And 3+4?"))
    sides = {"chosen": [*prompt, *assistant_turn("7")], "rejected": [*prompt, *assistant_turn("8")]}
    assert one({**exchanges, **sides}).prompt == prompt
    exchanges["conversation"][-1]["output"] = "7"
    assert (one(exchanges).prompt, one(exchanges).answer) == (prompt, assistant_turn("7"))


@pytest.mark.parametrize("name", ["system-prompt", "systemPrompt", "System  Prompt", "sys_prompt"])
def test_known_names_in_every_spelling(name):
    record = one({"prompt": "2+3?", name: "Be brief.", **PAIR})
    assert record.prompt == turns(("system", "Be brief."), ("user", "2+3?"))


def test_an_error_names_columns_as_they_are_written():
    assert "'systemPrompt'" in str(refused({"userPrompt": "2+3?", "systemPrompt": "Be brief.", **PAIR}))


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "nan", **PAIR},
        {"prompt": "None", **PAIR},
        {"instruction": "Add.", "input": "nan", "output": "5"},
        {"prompt": "2+3?", "system": "nan", **PAIR},
        {"prompt": "2+3?", "chosen": "nan", "rejected": "6"},
        {"prompt": "['2+3?']", **PAIR},
        {"prompt": "2+3?", "chosen": "['5']", "rejected": "['6']"},
        {"prompt": "2+3?", "chosen": "['5' '6']", "rejected": "6"},
        {"prompt": "2+3?", "chosen": "array(['5'], dtype=object)", "rejected": "6"},
        {"prompt": "2+3?", "chosen": "{'text': '5'}", "rejected": "{'text': '6'}"},
        {"prompt": "2+3?", "completion": "{'text': '5', 'of': None}"},
    ],
)
def test_what_pandas_and_python_print_is_not_trained_on(row):
    error = refused(row)
    assert error.kind == "printed_value" and not error.malformed
    told = {name: name for name in row}
    if "input" not in row:
        assert one(row, columns=parse_columns(told)), "taken as it is where the user names the column"


@pytest.mark.parametrize(
    "answer", ["[1, 2, 3]", '["a", "b"]', '{"a": 1}', "{1: 2}", "None", "null", "['a'] + b", "{'a'"]
)
def test_an_answer_in_json_or_in_words_is_an_answer(answer):
    assert one({"prompt": "2+3?", "chosen": answer, "rejected": "6"}).chosen == answer


@pytest.mark.parametrize("sides", [("2 and 3, added? 5", "2 and 3, added? 6"), ("2 and 3, added? 5", "6")])
def test_an_answer_that_repeats_the_prompt_is_told(sides):
    told = Counter()
    one({"prompt": "2 and 3, added?", "chosen": sides[0], "rejected": sides[1]}, told=told)
    assert sum(told.values()) == 1 and "begin" in next(iter(told))
