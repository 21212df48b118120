"""Boundaries, terminator, truncation: the ids a model is trained on."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data_pipeline.batch import Fault, collate
from data_pipeline.encode import Drop, Encoder
from data_pipeline.errors import DataError
from data_pipeline.records import AnswerRecord, PreferenceRecord, assistant_turn, user_turn


def scored(side):
    return side.ids[side.prompt_length :].tolist()


def pair(prompt="ab", chosen="cd", rejected="efg"):
    return PreferenceRecord("x", prompt, chosen, rejected)


def test_plain_pair(tokenizer):
    got = Encoder(tokenizer)(pair())
    eos = tokenizer.eos_token_id
    assert tokenizer.decode(got.chosen.ids[:2]) == tokenizer.decode(got.rejected.ids[:2]) == "ab"
    assert scored(got.chosen) == [*tokenizer("cd")["input_ids"], eos]
    assert scored(got.rejected) == [*tokenizer("efg")["input_ids"], eos]
    assert got.chosen.prompt_length == got.rejected.prompt_length == 2
    assert got.chosen.ids.dtype == np.int32


def test_no_merge_reaches_over_the_boundary(make_tokenizer):
    """'b' + 'c' is one token in the joint text; the prompt a model is given ends in 'b' all the same."""
    tokenizer = make_tokenizer(merges=[("b", "c")])
    assert len(tokenizer("abcd")["input_ids"]) == 3
    got = Encoder(tokenizer)(pair())
    assert got.chosen.ids[: got.chosen.prompt_length].tolist() == tokenizer("ab")["input_ids"]
    assert tokenizer.decode(got.chosen.ids, skip_special_tokens=True) == "abcd"


def test_chat_has_no_phantom_turn(chat_tokenizer):
    record = pair(user_turn("hi"), assistant_turn("yes"), assistant_turn("no"))
    got = Encoder(chat_tokenizer)(record)
    text = "<head>user</head>hi<eot><head>assistant</head>"
    assert chat_tokenizer.decode(got.chosen.ids) == text + "yes<eos>"
    assert chat_tokenizer.decode(got.rejected.ids) == text + "no<eos>"
    assert chat_tokenizer.decode(scored(got.chosen)) == "yes<eos>"
    given = chat_tokenizer.apply_chat_template([{"role": "user", "content": "hi"}], add_generation_prompt=True)
    given = given["input_ids"] if hasattr(given, "keys") else given
    assert got.chosen.ids[: got.chosen.prompt_length].tolist() == list(given)


def test_templates(tokenizer, chat_tokenizer):
    turns = pair(user_turn("hi"), assistant_turn("yes"), assistant_turn("no"))
    plain = "\n\nHuman: hi\n\nAssistant: yes<eos>"
    assert tokenizer.decode(Encoder(tokenizer)(turns).chosen.ids) == plain
    assert chat_tokenizer.decode(Encoder(chat_tokenizer, template="plain")(turns).chosen.ids) == plain
    assert chat_tokenizer.decode(Encoder(chat_tokenizer)(pair()).chosen.ids) == "abcd<eos>"
    chat = chat_tokenizer.decode(Encoder(chat_tokenizer, template="chat")(pair()).chosen.ids)
    assert chat == "<head>user</head>ab<eot><head>assistant</head>cd<eos>"
    with pytest.raises(DataError, match="no chat template"):
        Encoder(tokenizer, template="chat")


def test_terminator_of_the_family(tokenizer):
    assert scored(Encoder(tokenizer, terminator=5)(pair()).chosen)[-1] == 5


@pytest.mark.parametrize("closing", ["<eos>", "<eos>\n", "<eos> <eos>", "<eot>", "<|im_end|><eos>"])
def test_one_terminator_is_scored_whatever_the_answer_closes_with(tokenizer, closing):
    plain = Encoder(tokenizer, terminator=5)  # <eot>
    got = plain(pair("ab", f"cd{closing}", "e\n"))
    assert tokenizer.decode(scored(got.chosen)) == "cd<eot>"
    assert tokenizer.decode(scored(got.rejected)) == "e\n<eot>"
    assert got.ended and not plain(pair()).ended
    turns = pair(user_turn("ab"), assistant_turn("cd<eos>"), assistant_turn("e"))
    assert tokenizer.decode(scored(Encoder(tokenizer)(turns).chosen)) == " cd<eos>"


def test_a_terminator_within_an_answer_or_alone_drops_the_record(tokenizer):
    within, alone = (Encoder(tokenizer)(pair("ab", text)) for text in ("c<eos>d", "<eos>"))
    assert isinstance(within, Drop) and within.reason == "special_token"
    assert isinstance(alone, Drop) and alone.reason == "empty_answer"
    spaced = Encoder(tokenizer)(pair(user_turn("ab"), assistant_turn("<eos>"), assistant_turn("e")))
    assert isinstance(spaced, Drop) and spaced.reason == "empty_answer"
    in_prompt = Encoder(tokenizer)(pair("a<eos>b"))
    assert scored(in_prompt.chosen).count(tokenizer.eos_token_id) == 1


def test_beginning_of_sequence(make_tokenizer):
    tokenizer = make_tokenizer(bos_token="<head>")
    tokenizer.add_bos_token = True
    got = Encoder(tokenizer)(pair())
    assert got.chosen.ids[0] == tokenizer.bos_token_id
    assert got.chosen.prompt_length == 3


def test_unpaired(tokenizer):
    good, bad = (Encoder(tokenizer)(AnswerRecord("x", "ab", "cd", label)) for label in (True, False))
    assert (good.rejected, bad.chosen) == (None, None)
    batch = collate([good, bad, None], pad_id=0, epoch=0, step=0, micro=0, last_micro=True)
    assert batch.weight_B2.tolist() == [[1, 0], [0, 1], [0, 0]]
    assert batch.pair_weight_B.tolist() == [0, 0, 0]


@pytest.mark.parametrize(("truncation", "kept"), [("keep_end", "ef"), ("keep_start", "ab")])
def test_prompt_truncation(tokenizer, truncation, kept):
    got = Encoder(tokenizer, max_length=20, max_prompt_length=2, truncation=truncation)(pair("abcdef", "x", "y"))
    assert tokenizer.decode(got.chosen.ids) == f"{kept}x<eos>"
    assert got.truncated


@pytest.mark.parametrize(("truncation", "kept"), [("keep_end", "ef"), ("keep_start", "ab")])
def test_the_headers_of_a_cut_prompt_stay(tokenizer, chat_tokenizer, truncation, kept):
    chat = "<head>user</head>{}<eot><head>assistant</head>x<eos>"  # 6 + 12 tokens around the content
    plain = "\n\nHuman: {}\n\nAssistant: x<eos>"  # 9 + 12
    for made, text, limit in ((chat_tokenizer, chat, 20), (tokenizer, plain, 23)):
        encoder = Encoder(made, max_length=40, max_prompt_length=limit, truncation=truncation)
        got = encoder(pair(user_turn("abcdef"), assistant_turn("x"), assistant_turn("y")))
        assert made.decode(got.chosen.ids) == text.format(kept)
        assert got.truncated and got.chosen.prompt_length == limit
        few = Encoder(made, max_length=40, max_prompt_length=limit - 2, truncation=truncation)
        assert few(pair(user_turn("abcdef"), assistant_turn("x"), assistant_turn("y"))).reason == "over_long_prompt"


def test_a_conversation_is_cut_by_turns(chat_tokenizer):
    turns = (*user_turn("abcdef"), *assistant_turn("ghi"), *user_turn("jkl"))
    for limit, kept in ((45, "ef<eot><head>assistant</head>ghi<eot><head>user</head>jkl"), (30, "jkl"), (20, "kl")):
        encoder = Encoder(chat_tokenizer, max_length=90, max_prompt_length=limit)
        text = chat_tokenizer.decode(encoder(pair(turns, assistant_turn("x"), assistant_turn("y"))).chosen.ids)
        assert text == f"<head>user</head>{kept}<eot><head>assistant</head>x<eos>"


def test_the_beginning_of_a_conversation_is_cut_by_turns(chat_tokenizer):
    turns = (*user_turn("abcdef"), *assistant_turn("ghi"), *user_turn("jkl"))
    whole = "abcdef<eot><head>assistant</head>ghi<eot><head>user</head>"
    for limit, kept in (
        (48, f"{whole}jk"),
        (47, f"{whole}j"),
        (46, "abcdef"),
        (24, "abcdef"),
        (23, "abcde"),
        (19, "a"),
    ):
        encoder = Encoder(chat_tokenizer, max_length=90, max_prompt_length=limit, truncation="keep_start")
        text = chat_tokenizer.decode(encoder(pair(turns, assistant_turn("x"), assistant_turn("y"))).chosen.ids)
        assert text == f"<head>user</head>{kept}<eot><head>assistant</head>x<eos>"


def test_a_template_that_writes_content_twice_cannot_be_cut(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}<head>{{ m.content }}|{{ m.content }}{% endfor %}<eot>"
    record = pair(user_turn("abcdef"), assistant_turn("x"), assistant_turn("y"))
    assert not isinstance(Encoder(tokenizer)(record), Drop)
    made = Encoder(tokenizer, max_length=20, max_prompt_length=9)(record)
    assert made.reason == "refused_by_template" and "cannot be cut" in made.detail


def test_a_template_that_trims_is_cut_at_what_it_writes(chat_tokenizer):
    record = pair(user_turn("  abcdef \n"), assistant_turn("x"), assistant_turn("y"))
    text = chat_tokenizer.decode(Encoder(chat_tokenizer, max_length=40, max_prompt_length=20)(record).chosen.ids)
    assert text == "<head>user</head>ef<eot><head>assistant</head>x<eos>"


def test_the_beginning_of_sequence_stays_before_a_cut_prompt(make_tokenizer):
    tokenizer = make_tokenizer(bos_token="<head>")
    tokenizer.add_bos_token = True
    got = Encoder(tokenizer, max_length=20, max_prompt_length=3)(pair("abcdef", "x", "y"))
    assert tokenizer.decode(got.chosen.ids) == "<head>efx<eos>"


def test_a_prompt_is_cut_to_what_the_answer_leaves_and_not_below_half(tokenizer):
    encoder = Encoder(tokenizer, max_length=12)
    assert encoder(pair("abcdefghij", "x", "yz")).chosen.prompt_length == 9  # 12 less 'yz' and its terminator
    assert encoder(pair("abcdefghij", "x", "y" * 20)).chosen.prompt_length == 6
    assert encoder(pair("abcdefgh", "x", "yz")).chosen.prompt_length == 8
    assert not encoder(pair("abcdefghi", "x", "yz")).truncated


def test_what_is_dropped(tokenizer):
    def drop(record, **options):
        made = Encoder(tokenizer, **options)(record)
        assert isinstance(made, Drop)
        return made.reason

    assert drop(pair("abcdef"), max_length=20, max_prompt_length=2, truncation="drop") == "over_long_prompt"
    assert drop(pair("ab", "c" * 30), max_length=20, answer_truncation="drop") == "over_long_answer"
    assert drop(pair("ab", "c" * 30 + "x", "c" * 30 + "y"), max_length=20) == "equal_after_cut"
    assert drop(pair("a<mask>b")) == "special_token"
    assert not isinstance(Encoder(tokenizer, forbidden_ids=())(pair("a<mask>b")), Drop)


def test_a_template_that_raises_drops_the_record(make_tokenizer):
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('roles must alternate') }}"
    made = Encoder(tokenizer)(pair(user_turn("a"), assistant_turn("b"), assistant_turn("c")))
    assert made == Drop("refused_by_template", "the chat template says: roles must alternate")


def test_cut_answers_have_no_terminator(tokenizer):
    got = Encoder(tokenizer, max_length=8)(pair("abc", "d" * 9, "e"))
    assert tokenizer.decode(got.chosen.ids) == "abc" + "d" * 5
    assert tokenizer.decode(got.rejected.ids) == "abce<eos>"
    assert got.truncated


@settings(max_examples=200, deadline=None)
@given(
    prompt=st.integers(1, 40),
    chosen=st.integers(1, 40),
    rejected=st.integers(1, 40),
    max_length=st.integers(3, 50),
    max_prompt=st.none() | st.integers(1, 60),
    truncation=st.sampled_from(["keep_end", "keep_start", "drop"]),
    answers=st.sampled_from(["cut", "drop"]),
)
def test_lengths_hold_for_any_sizes(tokenizer, prompt, chosen, rejected, max_length, max_prompt, truncation, answers):
    if max_prompt is not None and max_prompt >= max_length:
        with pytest.raises(DataError, match="max_prompt_length"):
            Encoder(tokenizer, max_length=max_length, max_prompt_length=max_prompt)
        return
    encoder = Encoder(
        tokenizer,
        max_length=max_length,
        max_prompt_length=max_prompt,
        truncation=truncation,
        answer_truncation=answers,
    )
    got = encoder(pair("p" * prompt, "c" * chosen, "r" * rejected))
    fits = prompt + max(chosen, rejected) + 1 <= max_length and prompt <= (max_prompt or prompt)
    if isinstance(got, Drop):
        assert not fits
        return
    assert got.truncated == (not fits)
    for side, length in ((got.chosen, chosen), (got.rejected, rejected)):
        assert 0 < side.prompt_length < len(side.ids) <= max_length
        assert side.prompt_length <= (max_prompt or max_length)
        ended = side.ids[-1] == tokenizer.eos_token_id
        assert len(scored(side)) - ended == length if ended else len(scored(side)) <= length
    assert got.chosen.prompt_length == got.rejected.prompt_length


@pytest.mark.parametrize(
    "wrong", [{"template": "x"}, {"truncation": "left"}, {"answer_truncation": "x"}, {"max_length": 2}]
)
def test_wrong_options(tokenizer, wrong):
    with pytest.raises(DataError, match=next(iter(wrong))):
        Encoder(tokenizer, **wrong)


def test_collate(tokenizer):
    got = Encoder(tokenizer)(pair())
    fault = Fault("k", "s", "key", "e")
    batch = collate([got, None], pad_id=9, epoch=1, step=2, micro=3, last_micro=False, faults=(fault,))
    assert batch.input_ids_B2T.shape == (2, 2, 6)
    assert batch.lengths_B2.tolist() == [[5, 6], [0, 0]]
    assert batch.prompt_lengths_B2.tolist() == [[2, 2], [0, 0]]
    assert batch.pair_weight_B.tolist() == [1, 0]
    assert torch.all(batch.input_ids_B2T[1] == 9)
    assert batch.input_ids_B2T[0, 0, 5] == 9
    assert (batch.ids, batch.faults) == (("x", ""), (fault,))
    assert collate([None], pad_id=0, epoch=0, step=0, micro=0, last_micro=True).input_ids_B2T.shape == (1, 2, 1)
