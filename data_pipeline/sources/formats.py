"""Rows of the field's data sets → records. A row's format is seen from its columns, or named with ``--format``.

| format        | columns                                                                                        |
|---------------|------------------------------------------------------------------------------------------------|
| preference    | a prompt beside chosen and rejected: strings or turns; the answers may repeat the prompt        |
| implicit      | chosen, rejected and nothing that can be a prompt: their common beginning is the prompt         |
| hh            | chosen, rejected: two transcripts ``\\n\\nHuman: ... \\n\\nAssistant: ...`` (prompt optional)  |
| unpaired      | a prompt, completion, label (KTO), or is_correct in its place                                   |
| answer        | a prompt and a completion, or turns that end with the answer: one good answer (SFT)            |
| candidates    | a question with several answers, each right or wrong (see ``candidates.py``)                   |

Which columns hold a prompt, and what stands around it: ``columns.py``. This is the one reader of rows: those of files,
tables, saved data sets and other makers' shards all come through here.
Sources: TRL's ``dataset_formats`` page; the hh-rlhf, ultrafeedback_binarized and grade-school-math releases; the data
documentation of LlamaFactory, ms-swift and OpenAI's fine-tuning.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from data_pipeline.records import (
    FALSE,
    GRADES,
    LABELS,
    TRUE,
    AnswerRecord,
    Message,
    PreferenceRecord,
    Record,
    RecordError,
    Text,
    answer_label,
    as_object,
    aside_of,
    assistant_turn,
    decode_record,
    parse_json,
    user_turn,
    with_id,
)
from data_pipeline.sources.candidates import Pairing, candidate_records, has_candidates, is_long
from data_pipeline.sources.columns import (
    ANSWERS,
    ASKED,
    FLAGS,
    LISTS,
    META_COLUMNS,
    TEXTS,
    TURNS,
    Columns,
    Fields,
    absent,
    is_graded,
    read_prompt,
    read_template_kwargs,
    refuse_rivals,
    with_turns_before,
)
from data_pipeline.sources.turns import answer_begins

FORMATS = ("auto", "preference", "implicit", "hh", "unpaired", "answer", "candidates")
HH_TURN = re.compile(r"(?:\n\n|\A\s*)(Human|Assistant):")  # at the beginning the empty line may have been stripped
HH_ROLES = {"Human": "user", "Assistant": "assistant"}
OTHER_SIDE = re.compile("reject|chosen|prefer|worse|loser|lose|negative", re.IGNORECASE)
OTHER_LABEL = re.compile(
    "label|(?<![a-z])tag|good|desirab|thumb|accept|prefer|correct|right|wrong|bad|chosen|reject|safe|harm|toxic|approv"
    "|vote|verdict|valid|success|passed|useful",
    re.IGNORECASE,
)
OF_THE_BAD = re.compile(
    "harm(?!less)|toxic|wrong|bad|reject|unsafe|incorrect|undesirab|invalid|unsuccess", re.IGNORECASE
)
GRADE_WORDS = frozenset((*TRUE, *FALSE, "correct", "incorrect", "right", "wrong"))
SENTENCE_ENDS = "。！？：；…"  # where text without blanks may be split
TO_BE_BUILT = "to_be_built"  # kind of a row that does not make one record of its own
SPLIT = "prompt split from the answers' common beginning"
REPEATED = "both answers begin with the words of the prompt, and are learned so"
ONE_REPEATS = "one answer of two begins with the words of the prompt, and is learned so"


@dataclass(frozen=True)
class RowOptions:
    """How a row becomes records: its format, how graded answers are paired, which columns are what."""

    format: str = "auto"
    pairing: Pairing = field(default_factory=Pairing)
    columns: Columns = ()


def detect_format(row: dict) -> str:
    """The format of a row, from its columns and their types. Raises RecordError when none fits."""
    if "chosen" in row or "rejected" in row:
        return _detect_pair(row)
    _refuse_steps(row)
    if has_candidates(row):
        return "candidates"
    if "label" in row or "kto_tag" in row or is_long(row):
        return "unpaired"
    if any(name in row for name in TURNS) or (
        any(name in row for name in ASKED) and any(name in row for name in ANSWERS)
    ):
        return "answer"
    if "prompt" in row:
        return "preference"
    raise absent("answer" if any(name in row for name in ASKED) else "prompt", row)


def _detect_pair(row: dict) -> str:
    chosen, first = row.get("chosen"), row.get("prompt") or row.get("chosen")
    if isinstance(first, str) and isinstance(chosen, str) and _is_transcript(first, not row.get("prompt")):
        return "hh"
    mapped = getattr(row, "mapped", ())
    if row.get("prompt") and "prompt" not in mapped and _are_transcripts(chosen, row.get("rejected")):
        return "hh"  # the answers repeat the prompt
    if any(row.get(name) for name in (*ASKED, *TURNS)):
        return "preference"
    # an empty prompt beside two texts is counted as such; conversations bring their own
    return "preference" if "prompt" in row and isinstance(chosen, str) else "implicit"


def _refuse_steps(row: dict) -> None:
    """TRL's stepwise supervision looks like graded candidates, but its completions are steps of one answer."""
    if "steps" in row or {"completions", "labels"} <= set(row):
        raise RecordError(
            "stepwise_supervision",
            "the row grades the steps of one answer, which are no rival answers: make pairs of whole answers of it, or "
            "say --format candidates if they are rivals",
            malformed=True,
        )


def _is_transcript(text: str, whole: bool) -> bool:
    """Whether a text begins with a turn. One without the empty line before it may be somebody's own prompt, such as
    ``Human: Hi``; then a second turn tells. A ``whole`` text is never anything else: with turns that cannot be told it
    is counted, for splitting it by characters would end inside the answer."""
    begins = HH_TURN.match(text) is not None
    return begins and (whole or text.startswith("\n\n") or len(HH_TURN.findall(text)) > 1)


def _are_transcripts(*sides: Any) -> bool:
    """Whether both answers are whole transcripts, a human's turn and an answer at least."""
    return all(
        isinstance(side, str) and HH_TURN.match(side) is not None and len(HH_TURN.findall(side)) > 1 for side in sides
    )


def convert(
    row: dict,
    *,
    format: str = "auto",
    pairing: Pairing | None = None,
    columns: Columns = (),
    told: Counter | None = None,
) -> Iterator[Record]:
    """The records of one row: one, or for ``candidates`` any number. ``told`` counts the columns that are not read, and
    the guesses made, for the user to be told of. Raises RecordError."""
    fields = Fields(row, columns)
    fields.format = format
    name = detect_format(fields) if format == "auto" else format
    if name == "candidates":
        fields.read.update((*LISTS, *FLAGS, *TEXTS, "model"), (key for key in fields if is_graded(fields[key])))
        prompt, given = _prompt_of(fields), read_template_kwargs(fields)
        records: list[Record] = list(candidate_records(fields, pairing or Pairing(), prompt, given))
    else:
        records = [CONVERTERS[name](fields)]
    if told is not None:
        fields.finish()
        told.update({f"column {column!r}": count for column, count in fields.unread.items()})
        told.update(fields.notes)
    yield from records


@dataclass(frozen=True)
class RowReader:
    """``reader(raw JSON)`` → the one record of a row of other makers, read as ``build`` reads it."""

    options: RowOptions = RowOptions()

    def __call__(self, raw: bytes, told: Counter | None = None) -> Record:
        """Raises RecordError; of kind ``TO_BE_BUILT`` where rows and records are not one to one."""
        row, options = parse_json(raw), self.options
        if options.format in ("auto", "candidates") and is_long(fields := Fields(row, options.columns)):
            raise RecordError(TO_BE_BUILT, f"{len(fields)} columns of one graded answer, to be gathered by question")
        records = list(convert(row, format=options.format, pairing=options.pairing, columns=options.columns, told=told))
        if len(records) != 1:
            raise RecordError(TO_BE_BUILT, f"the row makes {len(records)} pairs")
        return records[0]


def reader_of(manifest: dict) -> Callable[[bytes], Record]:
    """How the records of an index are read: as ``build`` stored them, or as rows of other makers' shards."""
    if "reading" not in manifest:
        return decode_record
    reading = manifest["reading"]
    columns = tuple((ours, tuple(theirs)) for ours, theirs in reading["columns"])
    return RowReader(RowOptions(reading["format"], columns=columns))


# ------------------------------------------------------------------------------------------------ converters


def _pair(fields: Fields, prompt: Text, chosen: Text, rejected: Text) -> Record:
    """The checked record; where the prompt is turns, the answers are turns too."""
    prompt = with_turns_before(prompt, fields)
    if isinstance(prompt, str):
        _tell_repeats(fields, prompt, [side for side in (chosen, rejected) if isinstance(side, str)])
    else:
        chosen, rejected = (assistant_turn(side) if isinstance(side, str) else side for side in (chosen, rejected))
        _one_answer(chosen, rejected)  # type: ignore[arg-type]
        _tell_repeats(fields, prompt[-1]["content"], [side[0]["content"] for side in (chosen, rejected)])  # type: ignore[index]
        prompt = _before_answer(prompt)
    fields.refuse_thoughts()
    record = PreferenceRecord("", prompt, chosen, rejected, _meta(fields), read_template_kwargs(fields))
    return with_id(record, fields.get("id"))


def _tell_repeats(fields: Fields, prompt: str, answers: list[str]) -> None:
    count = sum(_repeats(answer, prompt) for answer in answers)
    if count:
        fields.notes[REPEATED if count == len(answers) else ONE_REPEATS] += 1


def _repeats(answer: str, prompt: str) -> bool:
    """Some words, not a few letters, which stand at the beginning of many an answer."""
    return len(prompt.strip()) >= 8 and answer.lstrip().startswith(prompt.strip())


def _before_answer(prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """Prompt turns without an empty last one of the assistant: it says no more than that its turn begins. A call of a
    tool that nobody answered cannot be continued by an answer."""
    if not prompt or prompt[-1]["role"] != "assistant":
        return prompt
    if prompt[-1].get("tool_calls") or prompt[-1].get("function_call"):
        raise RecordError("prompt_without_question", "the prompt ends with a call of a tool that nobody answered")
    return prompt if prompt[-1]["content"] or aside_of(prompt[-1]) else prompt[:-1]


def _prompt_of(fields: Fields, said: tuple[Text, ...] = ()) -> Text:
    """The prompt with all that stands before it."""
    prompt = read_prompt(fields, said)
    if prompt is None:
        raise absent("prompt", fields)
    return with_turns_before(prompt, fields)


def _preference(fields: Fields) -> Record:
    """Explicit prompt. In the layout of UltraFeedback-binarized chosen and rejected repeat the prompt as first turn."""
    chosen, rejected = (fields.text(name) for name in ("chosen", "rejected"))
    prompt = read_prompt(fields, (chosen, rejected))
    if prompt is None:
        raise absent("prompt", fields)
    if isinstance(chosen, tuple) != isinstance(rejected, tuple):
        raise RecordError("wrong_type", "one of chosen and rejected is text, the other messages", malformed=True)
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        if isinstance(prompt, str):
            prompt = _repeated_prompt(prompt, chosen, rejected)
        chosen, rejected = (_without_prompt(side, prompt) for side in (chosen, rejected))
    return _pair(fields, prompt, chosen, rejected)


def _without_prompt(side: tuple[Message, ...], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """An answer's turns without the prompt that they repeat; the system's turn may be missing there. Of a prompt that
    ends within the answer the repeated words go."""
    for start in (prompt, prompt[1:] if prompt and prompt[0]["role"] == "system" else prompt):
        if start and side[: len(start)] == start:
            return side[len(start) :]
        whole = len(side) == len(start) and start and start[-1]["role"] == "assistant"
        if whole and side[:-1] == start[:-1] and side[-1]["content"].startswith(start[-1]["content"]):
            rest = side[-1]["content"].removeprefix(start[-1]["content"])
            return ({**side[-1], "content": rest},)
    return side


def _repeated_prompt(prompt: str, chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns both sides share, when they repeat the prompt column; else the prompt as one user turn."""
    shared = _common_turns(chosen, rejected)
    if any(turn["content"].strip() == prompt.strip() for turn in shared):
        return shared
    return user_turn(prompt)


def _implicit(fields: Fields) -> Record:
    """No prompt column: the prompt is what both sides begin with."""
    chosen, rejected = (fields.text(name) for name in ("chosen", "rejected"))
    if isinstance(chosen, tuple) and isinstance(rejected, tuple):
        prompt: Text = _common_turns(chosen, rejected)
        if not prompt:
            _refuse_unknown(fields)
        chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        _one_answer(chosen, rejected)
        refuse_rivals(fields, [prompt, chosen, rejected])
    elif isinstance(chosen, str) and isinstance(rejected, str):
        _refuse_unknown(fields)
        cut = _common_words(chosen, rejected)
        prompt, chosen, rejected = chosen[:cut], chosen[cut:], rejected[cut:]
        if not prompt.strip():
            raise RecordError(
                "no_prompt",
                "there is no field 'prompt', and chosen and rejected share no first words that end at a blank or a "
                "full stop; give the prompt a column of its own, or name it with --columns prompt=COLUMN",
            )
        fields.notes[SPLIT] += 1
    else:
        raise RecordError("wrong_type", "one of chosen and rejected is text, the other messages", malformed=True)
    return _pair(fields, prompt, chosen, rejected)


def _refuse_unknown(fields: Fields) -> None:
    """Before a prompt is split from the answers: no other column may be one. What is known to be none is left aside,
    and where the user named the format, all other columns are."""
    if fields.format == "implicit":
        return
    known = {"chosen", "rejected", "id", "meta", *META_COLUMNS, "tools", "chat_template_kwargs", "template_kwargs"}
    others = [name for name, value in fields.items() if name not in known and isinstance(value, str | list | dict)]
    if any(fields[name] for name in others):
        found = ", ".join(map(repr, fields.found()))
        raise RecordError(
            "unknown_prompt",
            f"no column is known to hold the prompt (columns found: {found}); name it with --columns prompt=COLUMN, or "
            "say --format implicit if chosen and rejected begin with it",
            malformed=True,
        )


def _common_turns(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """The leading turns that are equal, leaving each side its last turn."""
    longest = max(0, min(len(chosen), len(rejected)) - 1)
    count = next((i for i in range(longest) if chosen[i] != rejected[i]), longest)
    return chosen[:count]


def _common_words(chosen: str, rejected: str) -> int:
    """Length of the longest common beginning that ends where the assistant's turn begins; in texts without turns that
    ends between words (white space stays with what follows), or, as text without blanks has no words to tell, behind a
    full-width full stop or colon."""
    limit = min(len(chosen), len(rejected))
    cut = next((i for i in range(limit) if chosen[i] != rejected[i]), limit)
    if (begins := answer_begins(chosen, rejected, cut)) is not None:
        return begins
    while cut and not _between_words(chosen, cut) and not _between_words(rejected, cut):
        cut -= 1
    return cut


def _between_words(text: str, place: int) -> bool:
    return text[place : place + 1].isspace() or text[place - 1] in SENTENCE_ENDS


def _one_answer(*sides: tuple[Message, ...]) -> None:
    """Each side must be one assistant turn: what comes after a diverging turn is no answer to the same prompt."""
    for side in sides:
        if len(side) != 1 or side[0]["role"] != "assistant":
            turns = ", ".join(turn["role"] for turn in side) or "nothing"
            raise RecordError("not_one_answer", f"after the common turns stands not one assistant turn but {turns}")


def parse_transcript(text: str) -> tuple[Message, ...]:
    """The turns of an hh-rlhf transcript, contents stripped. Raises RecordError when it is none."""
    head, *rest = HH_TURN.split(text)
    if head.strip() or not rest:
        raise RecordError("not_a_transcript", "the text does not begin with 'Human:' or 'Assistant:'")
    return tuple(
        {"role": HH_ROLES[speaker], "content": content.strip()}
        for speaker, content in zip(rest[::2], rest[1::2], strict=True)
    )


def _transcript(fields: Fields, name: str) -> str:
    text = fields.text(name)
    if not isinstance(text, str):
        raise RecordError("wrong_type", f"field {name!r} is not a transcript but messages", malformed=True)
    return text


def _hh(fields: Fields) -> Record:
    """Anthropic's transcripts, whole or with the prompt cut off at the last ``Assistant:``.

    The split is by turns. The longest common character prefix, used elsewhere, ends inside the answer for 19 % of
    the pairs, because both answers often begin with the same words.
    """
    texts = [_transcript(fields, name) for name in ("chosen", "rejected")]
    if fields.get("prompt") and ("prompt" in fields.mapped or not _are_transcripts(*texts)):
        prompt, chosen, rejected = _continued(_transcript(fields, "prompt"), *texts)
    else:
        prompt, chosen, rejected = _split(fields, *(parse_transcript(text) for text in texts))
    refuse_rivals(fields, [prompt, chosen, rejected])
    return _pair(fields, prompt, chosen, rejected)


def _split(fields: Fields, *sides: tuple[Message, ...]) -> list[tuple[Message, ...]]:
    """[prompt, chosen, rejected] of two whole transcripts, whose prompt a column may repeat."""
    prompt = _common_turns(*sides)
    answers = [side[len(prompt) :] for side in sides]
    _one_answer(*answers)
    if not prompt or prompt[-1]["role"] != "user":
        raise RecordError("prompt_without_question", "the last turn of the prompt is not the human's")
    asked = fields.get("prompt")
    if isinstance(asked, str) and HH_TURN.match(asked) and _continued(asked, "", "")[0] == prompt:
        fields.read.add("prompt")
    return [prompt, *answers]


def _continued(text: str, chosen: str, rejected: str) -> tuple[tuple[Message, ...], ...]:
    """(prompt, chosen, rejected) of a transcript and the two ways it goes on: behind ``Assistant:``, or behind the
    words with which the answer begins there, as they are written."""
    prompt = parse_transcript(text)
    if prompt[-1]["role"] == "user" or not prompt[-1]["content"]:
        prompt = prompt if prompt[-1]["role"] == "user" else prompt[:-1]
        return prompt, assistant_turn(chosen.strip()), assistant_turn(rejected.strip())
    blanks = text[len(text.rstrip()) :]
    last: Message = {**prompt[-1], "content": prompt[-1]["content"] + blanks}
    return (*prompt[:-1], last), assistant_turn(chosen), assistant_turn(rejected)


def _unpaired(fields: Fields) -> Record:
    label = answer_label(fields, LABELS)
    if label is None:
        raise absent("label", fields)
    return _single(fields, label)


def _answer(fields: Fields) -> Record:
    """A good answer, unless the row says that it is wrong."""
    if fields.unlabelled and not set(LABELS) & set(fields):
        raise RecordError(
            "missing_field",
            f"{fields.unlabelled[0]!r} is empty: say whether the answer is good, or take the column out",
            malformed=True,
        )
    return _single(fields, answer_label(fields, GRADES) is not False)


def _single(fields: Fields, label: bool) -> Record:
    fields.read.update(LABELS)
    prompt, answer = _prompt_and_answer(fields)
    fields.refuse_thoughts()
    _refuse_other_sides(fields)
    record = AnswerRecord("", prompt, answer, label, _meta(fields), read_template_kwargs(fields))
    return with_id(record, fields.get("id"))


def _refuse_other_sides(fields: Fields) -> None:
    """Single answers are taken for good ones: what may say otherwise, or be the other answer, is not passed over."""
    for name in fields.left():
        if OTHER_SIDE.search(name) and isinstance(fields[name], str | list | dict):
            what = "may be another answer of a pair: name both with --columns chosen=COLUMN,rejected=COLUMN"
        elif OTHER_LABEL.search(name) and _may_be_a_label(fields[name]):
            what = "may say whether the answer is good: name it with --columns label=COLUMN"
            if OF_THE_BAD.search(name):  # named a label, it would make good answers of bad ones
                what = "may say that the answer is bad: give the rows a column 'label' that says whether it is good"
        else:
            continue
        raise RecordError("unknown_column", f"{name!r} {what}, or take it out of the data", malformed=True)


def _may_be_a_label(value: Any) -> bool:
    return value in (0, 1) or (isinstance(value, str) and value.strip().lower() in GRADE_WORDS)


def _prompt_and_answer(fields: Fields) -> tuple[Text, Text]:
    answers = sorted((name for name in (*ANSWERS, "solution") if name in fields), key=lambda n: n not in fields.mapped)
    name = next(iter(answers), None)
    turns = next((name for name in TURNS if fields.get(name)), None)
    if name is None and turns is not None:
        messages = fields.text(turns)
        if not isinstance(messages, tuple) or len(messages) < 2 or messages[-1]["role"] != "assistant":
            raise RecordError("not_one_answer", f"{turns!r} does not end with an assistant turn after another turn")
        refuse_rivals(fields, [messages])
        prompt: Text = with_turns_before(messages[:-1], fields)
        answer: Text = messages[-1:]
    else:
        answer = fields.text(name or "completion")
        _refuse_other_answers(fields, answer)
        prompt = _prompt_of(fields, (answer,))
    if isinstance(answer, tuple) and isinstance(prompt, str):
        prompt = user_turn(prompt)
    elif isinstance(prompt, tuple) and isinstance(answer, str):
        answer = assistant_turn(answer)
    if isinstance(prompt, tuple) and isinstance(answer, tuple):
        answer = _without_prompt(answer, prompt)
        _one_answer(answer)
        prompt = _before_answer(prompt)
    return prompt, answer


def _refuse_other_answers(fields: Fields, answer: Text) -> None:
    """Two columns that could be the answer must say the same, unless the user has said which it is."""
    names = [name for name in (*ANSWERS, "solution") if fields.get(name)]
    if not fields.mapped & set(names) and (other := next((n for n in names if fields.text(n) != answer), None)):
        raise RecordError(
            "ambiguous_answer",
            f"{names[0]!r} and {other!r} can both be the answer: say which with --columns answer=COLUMN",
            malformed=True,
        )


def _meta(fields: Fields) -> dict[str, Any]:
    return {**as_object(fields, "meta"), **{name: fields[name] for name in META_COLUMNS if name in fields}}


CONVERTERS: dict[str, Callable[[Fields], Record]] = {
    "preference": _preference,
    "implicit": _implicit,
    "hh": _hh,
    "unpaired": _unpaired,
    "answer": _answer,
}
