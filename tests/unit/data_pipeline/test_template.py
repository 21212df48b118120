"""Chat templates: tried out beforehand; what they leave out of a row is refused; where an answer begins is exact."""

import pytest
from tokenizers.processors import TemplateProcessing

from data_pipeline import template
from data_pipeline.encode import Drop, Encoder, beginning_of
from data_pipeline.errors import DataError
from data_pipeline.facts import refuse_unusable
from data_pipeline.records import AnswerRecord, PreferenceRecord, assistant_turn, user_turn
from data_pipeline.truncate import MARK

CHAT = (
    "{% for m in messages %}<head>{{ m['role'] }}</head>{{ m['content'] }}<eot>{% endfor %}"
    "{% if add_generation_prompt %}<head>assistant</head>{% endif %}"
)
TRIMS = CHAT.replace("{{ m['content'] }}", "{{ m['content'] | trim }}")
THINKS = CHAT.replace("{{ m['content'] }}", "{{ '(' + m.thinking + ') ' if m.thinking }}{{ m['content'] }}")
TOOLS = (
    "{% if tools %}<head>tools</head>{{ tools | tojson }}<eot>{% endif %}{% for m in messages %}"
    "<head>{{ m.role }}</head>{{ m.content }}{% for c in m.tool_calls or [] %}"
    "[{{ c.function.name }}{{ c.function.arguments | tojson }}]{% endfor %}"
    "<eot>{% endfor %}{% if add_generation_prompt %}<head>assistant</head>{% endif %}"
)
TOOL = {"type": "function", "function": {"name": "add", "parameters": {}}}
CALLED = {"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}
CALL = {"role": "assistant", "content": "", "tool_calls": [CALLED]}


@pytest.fixture(autouse=True)
def fresh():
    template.warn_once.cache_clear()


@pytest.fixture
def chat(make_tokenizer):
    """A tokenizer with a given template."""

    def make(text, **options):
        made = make_tokenizer(**options)
        made.chat_template = text
        return made

    return make


def pair(prompt, chosen="x", rejected="y", **kwargs):
    sides = (side if isinstance(side, tuple) else assistant_turn(side) for side in (chosen, rejected))
    return PreferenceRecord("x", prompt, *sides, {}, kwargs)


def text_of(encoder, record):
    got = encoder(record)
    assert not isinstance(got, Drop), got
    return encoder.tokenizer.decode(got.chosen.ids)


def reason(encoder, record):
    got = encoder(record)
    assert isinstance(got, Drop) and got.reason == "refused_by_template"
    return got.detail


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{% for m in messages %}{{ m.content }", "cannot be used: .*unexpected"),
        ({"rag": CHAT}, "cannot be used: .*no default"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}{% endfor %}", "contents as lists of parts"),
        ("{% for m in messages %}{{ m['content'][0].text }}{% endfor %}", "contents as lists of parts"),
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "leaves the content of a user's turn out"),
        ("{{ messages[0].contents }}", "leaves the content of a user's turn out"),
        ("Hello", "leaves the content of a user's turn out"),
        ("{{ messages[0].content + 1 }}", "cannot be used: .*"),
        ("{{ messages[7].content.text }}", "cannot be used: .*"),
        ("{% set f = strftime_now %}{{ f('%H') }}" + CHAT, "clock in a way that cannot be held still"),
    ],
)
@pytest.mark.parametrize("how", ["chat", "auto"])
def test_templates_that_cannot_be_used_are_refused_in_one_line(chat, text, message, how):
    with pytest.raises(DataError, match=message) as error:
        Encoder(chat(text), template=how)
    assert "\n" not in str(error.value) and "--template plain" in str(error.value)
    assert Encoder(chat(text), template="plain")(pair("q"))


def test_the_templates_own_words_are_told(chat, tmp_path, jsonl, cache):
    from data_pipeline.dataset import open_dataset

    words = "{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    encoder = Encoder(chat(words + CHAT), template="chat")
    record = pair(({"role": "system", "content": "s"}, *user_turn("q")))
    assert reason(encoder, record) == "the chat template says: System role not supported"
    rows = [{"system": "s", "prompt": f"q{i}", "chosen": "a", "rejected": "b"} for i in range(40)]
    dataset = open_dataset(str(jsonl(tmp_path / "a.jsonl", rows)), cache_dir=cache)
    with pytest.raises(DataError, match=r"all of the 32 records looked at .*System role not supported"):
        refuse_unusable(dataset, encoder)
    mended = [*rows[:-1], {"prompt": "q", "chosen": "a", "rejected": "b"}]
    refuse_unusable(open_dataset(str(jsonl(tmp_path / "b.jsonl", mended)), cache_dir=cache), encoder)


@pytest.mark.parametrize("ask", ["strftime_now('%H:%M:%S.%f')", 'strftime_now( "%d %b %Y" )'])
def test_a_template_that_reads_the_clock_is_held_still_and_told_of(chat, caplog, ask):
    guarded = "{% if strftime_now is defined %}{{ " + ask + " }}{% endif %}"
    encoder = Encoder(chat(guarded + CHAT), template="chat")
    assert "reads the clock" in caplog.text
    said = "00:00:00.000000" if "%H" in ask else "01 Jan 2025"
    assert text_of(encoder, pair("q")) == f"{said}<head>user</head>q<eot><head>assistant</head>x<eos>"


# ------------------------------------------------------------------------------------------ a turn to be continued


@pytest.mark.parametrize("text", [CHAT, TRIMS, TRIMS.replace("{% if add_generation_prompt %}", "{% if true %}")])
def test_a_prompt_that_ends_in_the_assistants_turn_is_continued(chat, text):
    encoder = Encoder(chat(text), template="chat")
    for content in ("The sum is", "The sum is ", "The sum is\n\n"):
        got = text_of(encoder, pair((*user_turn("1+2?"), *assistant_turn(content)), "3"))
        assert got == f"<head>user</head>1+2?<eot><head>assistant</head>{content}3<eos>"
    plain = Encoder(chat(text), template="plain")
    record = pair((*user_turn("1+2?"), *assistant_turn("The sum is")), " 3")
    assert text_of(plain, record) == "\n\nHuman: 1+2?\n\nAssistant: The sum is 3<eos>"


def test_a_continued_prompt_is_cut_at_its_beginning_or_dropped(chat):
    record = pair((*user_turn("abcdef" * 5), *assistant_turn("so ")), "x")
    for kind, template_text in (("chat", CHAT), ("plain", None)):
        options = {"max_length": 60, "max_prompt_length": 40, "template": kind}
        encoder = Encoder(chat(template_text or CHAT), **options)
        kept = text_of(encoder, record)
        assert kept.endswith("so x<eos>") and "abcdef" in kept and MARK not in kept
        drop = Encoder(encoder.tokenizer, truncation="keep_start", **options)(record)
        assert isinstance(drop, Drop) and drop.reason == "over_long_prompt"


# ---------------------------------------------------------------------------------- what stands beside the contents


def test_a_switch_that_the_template_does_not_have_is_told_once(chat, caplog):
    encoder = Encoder(chat(CHAT), template="chat")
    for _ in range(2):
        assert text_of(encoder, pair(user_turn("q"), enable_thinking=False))
    (told,) = caplog.records
    assert "'enable_thinking'" in told.getMessage()


def test_tools_and_calls_reach_a_template_that_reads_them_and_are_refused_by_one_that_does_not(chat):
    prompt = (*user_turn("1+1?"), CALL, {"role": "tool", "content": "2"})
    encoder = Encoder(chat(TOOLS), template="chat")
    got = text_of(encoder, pair(prompt, "It is 2.", tools=[TOOL]))
    assert '"name": "add"' in got and '[add{"a": 1}]' in got
    assert text_of(encoder, pair(prompt, "It is 2.")) != got
    deaf = Encoder(chat(CHAT), template="chat")
    assert "does not read 'tool_calls'" in reason(deaf, pair(prompt))
    assert "does not read 'tools'" in reason(deaf, pair(user_turn("q"), tools=[TOOL]))
    assert "does not read 'documents'" in reason(deaf, pair(user_turn("q"), documents=["d"]))
    for record in (pair(prompt), pair(user_turn("q"), tools=[TOOL])):
        assert "plain text has no place" in reason(Encoder(chat(TOOLS), template="plain"), record)


def test_a_call_can_be_the_answer(chat):
    encoder = Encoder(chat(TOOLS), template="chat")
    record = pair(user_turn("1+1?"), (CALL,), "I cannot.", tools=[TOOL])
    got = encoder(record)
    assert encoder.tokenizer.decode(got.chosen.ids[got.chosen.prompt_length :]) == '[add{"a": 1}]<eos>'
    assert "does not write 'tool_calls'" in reason(
        Encoder(chat(THINKS), template="chat"), pair(user_turn("q"), (CALL,))
    )


@pytest.mark.parametrize("name", ["thinking", "reasoning_content"])
def test_thoughts_of_an_answer_are_scored_or_refused(chat, name):
    answer = ({"role": "assistant", "content": "2", name: "one and one"},)
    read = Encoder(chat(THINKS.replace("m.thinking", f"m.{name}")), template="chat")
    got = read(pair(user_turn("1+1?"), answer, "3"))
    assert read.tokenizer.decode(got.chosen.ids[got.chosen.prompt_length :]) == "(one and one) 2<eos>"
    for text in (CHAT, TOOLS):
        assert f"does not write {name!r}" in reason(Encoder(chat(text), template="chat"), pair(user_turn("q"), answer))
    always = THINKS.replace("m.thinking", f"m.{name}").replace("{% if add_generation_prompt %}", "{% if true %}")
    assert "appends a header" in reason(Encoder(chat(always), template="chat"), pair(user_turn("q"), answer))
    assert "plain text" in reason(Encoder(chat(THINKS), template="plain"), pair(user_turn("q"), answer))
    single = AnswerRecord("x", user_turn("1+1?"), answer)
    assert read.tokenizer.decode(read(single).chosen.ids).endswith("(one and one) 2<eos>")


def test_a_prompt_with_calls_that_is_too_long_is_dropped(chat):
    prompt = (*user_turn("1+1?" * 50), CALL, {"role": "tool", "content": "2"})
    drop = Encoder(chat(TOOLS), max_length=60, template="chat")(pair(prompt))
    assert isinstance(drop, Drop) and drop.reason == "over_long_prompt"


# -------------------------------------------------------------------------------------------- what begins a text


@pytest.mark.parametrize("suffix", ["", " <eos>"])
def test_a_beginning_stands_where_the_tokenizer_puts_it(make_tokenizer, suffix, caplog):
    tokenizer = make_tokenizer(bos_token="<head>")
    ids = [(name, tokenizer.convert_tokens_to_ids(name)) for name in ("<head>", "<eos>")]
    tokenizer._tokenizer.post_processor = TemplateProcessing(single=f"<head> $A{suffix}", special_tokens=ids)
    assert beginning_of(tokenizer) == (tokenizer.bos_token_id,)
    got = Encoder(tokenizer)(PreferenceRecord("x", "ab", "cd", "e"))
    assert tokenizer.decode(got.chosen.ids) == "<head>abcd<eos>" and got.chosen.prompt_length == 3
    tokenizer.chat_template = CHAT.replace("<head>", "|")
    Encoder(tokenizer, template="chat")
    assert "puts <head> before plain text and the chat template does not: it is left out" in caplog.text


def test_no_beginning_is_invented(tokenizer, caplog):
    assert beginning_of(tokenizer) == ()
    Encoder(tokenizer)
    assert not caplog.text


# ------------------------------------------------------------------------------- what a template passes over


PASSES_OVER = (
    "{% for m in messages %}{% if m.role == 'user' %}<head>{{ m.content }}<eot>{% elif m.role == 'assistant' %}"
    "<head>a</head>{{ m.content }}<eot>{% endif %}{% endfor %}{% if add_generation_prompt %}<head>a</head>{% endif %}"
)
LAST = "<head>{{ messages[-1].content }}<eot><head>a</head>"


@pytest.mark.parametrize(
    ("text", "prompt"),
    [
        (PASSES_OVER, ({"role": "system", "content": "Be kind."}, *user_turn("q"))),
        (PASSES_OVER, ({"role": "developer", "content": "Be kind."}, *user_turn("q"))),
        (PASSES_OVER, (*user_turn("q"), *assistant_turn("b"), {"role": "tool", "content": "42"})),
        (LAST, (*user_turn("first"), *assistant_turn("b"), *user_turn("second"))),
        (CHAT.replace("m['content']", "m['content'] | upper"), user_turn("abc")),
        (CHAT.replace("m['content']", "m['content'][:4]"), user_turn("abcdef")),
    ],
)
def test_a_turn_that_the_template_does_not_write_is_refused(chat, text, prompt):
    encoder = Encoder(chat(text), template="chat")
    assert "does not write what a turn" in reason(encoder, pair(prompt))
    assert text_of(encoder, pair(user_turn("AB")))


def test_what_templates_change_around_contents_is_no_loss(chat):
    text = CHAT.replace("m['content']", "(m['content'].split('</think>')[-1] | trim | tojson)")
    encoder = Encoder(chat(text), template="chat")
    prompt = (*user_turn(' say "a\\b"\n'), *assistant_turn("<think>so</think>b"), *user_turn("b"))
    assert text_of(encoder, pair(prompt))


def test_tools_must_stand_in_what_is_written(chat):
    counts = "{{ tools | length if tools else '' }}" + CHAT  # reads them, and writes none
    assert "does not write a tool, 'add'" in reason(
        Encoder(chat(counts), template="chat"), pair(user_turn("q"), tools=[TOOL])
    )
    assert text_of(Encoder(chat(TOOLS), template="chat"), pair(user_turn("q"), tools=[TOOL]))


def test_a_template_that_throws_dice_is_refused(chat):
    with pytest.raises(DataError, match="to chance"):
        Encoder(chat("{{ ['a', 'b'] | random }}" + CHAT))


@pytest.mark.parametrize("answer", ["x<eot>y", "<head>user</head>y"])
def test_special_tokens_in_a_text_are_no_text(chat, answer):
    encoder = Encoder(chat(CHAT), template="chat")
    for record in (pair(user_turn("q"), answer), pair(user_turn(answer)), pair(answer)):
        got = encoder(record)
        assert isinstance(got, Drop) and got.reason == "special_token"
    rendered = "<head>user</head>q<eot><head>assistant</head>"
    record = PreferenceRecord("x", rendered, "x", "y")
    assert text_of(Encoder(chat(CHAT), template="auto"), record) == rendered + "x<eos>"
