"""Text → tokens: prompt, answer and one terminator, by the rules of the model's tokenizer.

The prompt's tokens are exactly those a model is given when it generates; the answer is tokenised on its own and put
behind them. So the prompt is a token prefix of both sides whatever the text is, and no merge of the tokenizer ever
reaches over the boundary, as it can when the boundary is looked up by characters in the joint text.

The chat template renders the prompt only, with the header of the assistant's turn. Templates that append such a header
always (LLaDA's does) would add a phantom turn behind a rendered answer; here no answer is rendered by the template.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jinja2 import TemplateError

from data_pipeline.errors import DataError
from data_pipeline.records import AnswerRecord, Message, Record, Text, answers_of, aside_of, user_turn
from data_pipeline.telling import warn_once
from data_pipeline.template import (
    LeftOut,
    check_reads,
    check_template,
    check_written,
    has_template,
    render,
    render_answer,
)
from data_pipeline.truncate import keep_end, keep_start

TEMPLATES = ("auto", "chat", "plain")
PROMPT_TRUNCATION = ("keep_end", "keep_start", "drop")
ANSWER_TRUNCATION = ("cut", "drop")
# No masks and segments that nobody reads; no warning for texts longer than the model: they are cut here.
QUIET = {"return_attention_mask": False, "return_token_type_ids": False, "verbose": False}
DROP_KINDS = (
    "over_long_prompt",
    "over_long_answer",
    "equal_after_cut",
    "special_token",
    "refused_by_template",
    "empty_answer",
)
MAX_LENGTH, MAX_PROMPT_LENGTH = 1024, 512  # tokens, where nothing else is asked for: training's defaults
END_OF_TURN = ("<|eot_id|>", "<|im_end|>")  # of the chat templates in use
PLAIN_ROLES = {"user": "Human", "assistant": "Assistant", "system": "System"}


@dataclass(frozen=True)
class TokenAnswer:
    """``ids`` int32: prompt, answer and terminator (none when the answer was cut); scored are ids[prompt_length:]."""

    ids: np.ndarray
    prompt_length: int


@dataclass(frozen=True)
class TokenPair:
    """A record in tokens. An unpaired record has None on one side: an undesirable answer stands under ``rejected``.
    ``ended``: the text of an answer closed with an end token of its own, which was taken off. ``meta``: the record's,
    for tasks: a right result, say, is read there and not from tokens."""

    id: str
    chosen: TokenAnswer | None
    rejected: TokenAnswer | None
    truncated: bool = False
    ended: bool = False
    meta: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Drop:
    """Why a record is left out: one of DROP_KINDS. (A chat template may refuse roles that do not alternate.)"""

    reason: str
    detail: str = ""


@dataclass(frozen=True)
class Encoder:
    """``encoder(record)`` → TokenPair or Drop.

    ``max_length`` counts prompt, answer and terminator; ``max_prompt_length`` the prompt alone (None: no limit of its
    own). A prompt is cut when it is longer than its limit, or when prompt and longer answer do not fit; then to what
    the answer leaves, but not below half of ``max_length``. ``truncation`` says which end of its content stays (the
    template's headers do), or drops the record. An answer that still does not fit is cut and has no terminator
    (``answer_truncation="cut"``: a model must not learn that answers end there), or the record is dropped.

    ``template``: ``chat`` (strings become a user's turn), ``plain`` (messages become ``\\n\\nHuman: ...`` turns), or
    ``auto``: chat for messages when the tokenizer has a template, plain otherwise. ``terminator`` is the id after an
    answer (None: the tokenizer's eos), and there is one: an end token that closes an answer's text is taken off, and a
    record with a terminator within an answer is dropped. ``forbidden_ids``: a record that contains one is dropped; by
    default the mask.
    """

    tokenizer: Any
    max_length: int = 1024
    max_prompt_length: int | None = None
    truncation: str = "keep_end"
    answer_truncation: str = "cut"
    template: str = "auto"
    terminator: int | None = None
    forbidden_ids: Sequence[int] | None = None
    _prefix: tuple[int, ...] = field(init=False, default=())
    _ends: tuple[str, ...] = field(init=False, default=())
    _own: Mapping[int, str] = field(init=False, default_factory=dict)  # special tokens, which stand for no text

    def __post_init__(self):
        self._check_options()
        tokenizer = self.tokenizer
        if self.terminator is None:
            if tokenizer.eos_token_id is None:
                raise DataError("the tokenizer has no eos token; name the id that ends an answer (terminator)")
            object.__setattr__(self, "terminator", int(tokenizer.eos_token_id))
        ends = {tokenizer.decode([self.terminator]), tokenizer.eos_token or "", *END_OF_TURN} - {""}
        object.__setattr__(self, "_ends", tuple(sorted(ends)))
        if self.forbidden_ids is None:
            mask = getattr(tokenizer, "mask_token_id", None)
            object.__setattr__(self, "forbidden_ids", () if mask is None else (int(mask),))
        object.__setattr__(self, "_prefix", beginning_of(tokenizer))
        own = {i: tokenizer.decode([i]) for i in tokenizer.all_special_ids if i != tokenizer.unk_token_id}
        object.__setattr__(self, "_own", {i: text for i, text in own.items() if text.strip()})
        if self.template == "chat" and not has_template(tokenizer):
            raise DataError("template is 'chat' but the tokenizer has no chat template; use --template plain")
        if self.template != "plain" and has_template(tokenizer):
            check_template(tokenizer)
            self._tell_of_beginning()

    def _tell_of_beginning(self) -> None:
        """The template writes all that stands before the turns; published models were trained so."""
        if not self._prefix or self.template != "chat":
            return
        text = render(self.tokenizer, user_turn("a"))
        if tuple(self._tokens(text)[: len(self._prefix)]) != self._prefix:
            words = self.tokenizer.decode(list(self._prefix))
            warn_once(f"the tokenizer puts {words} before plain text and the chat template does not: it is left out")

    def _check_options(self) -> None:
        for name, allowed in (
            ("template", TEMPLATES),
            ("truncation", PROMPT_TRUNCATION),
            ("answer_truncation", ANSWER_TRUNCATION),
        ):
            if getattr(self, name) not in allowed:
                raise DataError(f"{name} is {getattr(self, name)!r}; allowed: {', '.join(allowed)}")
        if self.max_length < 3:
            raise DataError(f"max_length is {self.max_length}; a prompt, an answer and a terminator need at least 3")
        if self.max_prompt_length is not None and not 0 < self.max_prompt_length < self.max_length:
            raise DataError(
                f"max_prompt_length is {self.max_prompt_length}; allowed: 1 to max_length - 1 = {self.max_length - 1}"
            )

    def __call__(self, record: Record) -> TokenPair | Drop:
        """The record in tokens, or why it is left out."""
        return self.encode_many([record])[0]

    def encode_many(self, records: Sequence[Record]) -> list[TokenPair | Drop]:
        """All records with one call of the tokenizer, which is most of the cost of loading."""
        texts: list[str] = []
        rendered: list[slice | Drop] = []
        for record in records:
            try:
                new = self._texts(record)
            except TemplateError as error:
                whose = "" if isinstance(error, LeftOut) else "the chat template says: "
                rendered.append(Drop("refused_by_template", f"{whose}{error}"))
                continue
            rendered.append(slice(len(texts), len(texts) + len(new)))
            texts += new
        ids = self._tokens(texts) if texts else []
        return [
            where if isinstance(where, Drop) else self._pair(record, ids[where])
            for record, where in zip(records, rendered, strict=True)
        ]

    def _texts(self, record: Record) -> list[str]:
        chat, prompt, kwargs = self._uses_chat(record.prompt), record.prompt, record.template_kwargs
        turns = user_turn(prompt) if isinstance(prompt, str) else prompt
        if chat:
            check_reads(self.tokenizer, turns, kwargs)
        elif kwargs.keys() - {"enable_thinking"} or any(map(aside_of, turns)):
            raise LeftOut("plain text has no place for tools and thoughts")
        answers = [self._answer_text(turns, answer, chat, kwargs) for answer in answers_of(record)]
        text = self.prompt_text(prompt, chat, kwargs)
        if chat:
            check_written(text, turns, kwargs)
        return [text, *map(self._unended, answers)]

    def _answer_text(self, turns: Sequence[Message], answer: Text, chat: bool, kwargs: Mapping[str, Any]) -> str:
        if isinstance(answer, str) or not aside_of(answer[-1]):
            return answer_text(answer, spaced=not chat and turns[-1]["role"] != "assistant")
        if not chat:
            raise LeftOut("plain text has no place for tools and thoughts")
        return render_answer(self.tokenizer, turns, answer[-1], kwargs)

    def _tokens(self, texts: Any) -> Any:
        """The ids of a text, or of each of several."""
        return self.tokenizer(texts, add_special_tokens=False, **QUIET)["input_ids"]

    def _unended(self, answer: str) -> str:
        """An answer without the end tokens that close it; '' when that leaves only white space."""
        while (text := answer.rstrip()).endswith(self._ends):
            answer = text.removesuffix(next(end for end in self._ends if text.endswith(end)))
        return answer if answer.strip() else ""

    def _uses_chat(self, prompt: Text) -> bool:
        if self.template == "auto":
            return not isinstance(prompt, str) and bool(getattr(self.tokenizer, "chat_template", None))
        return self.template == "chat"

    def _pair(self, record: Record, ids: Sequence[list[int]]) -> TokenPair | Drop:
        bad = [token for token in self.forbidden_ids or () if any(token in part for part in ids)]
        if bad:
            return Drop("special_token", f"the text contains token {bad[0]}, which the model reserves")
        if any(self.terminator in answer for answer in ids[1:]):
            return Drop("special_token", f"an answer goes on behind the terminator, token {self.terminator}")
        if not all(ids[1:]):
            return Drop("empty_answer", "an answer holds nothing but the token that ends it")
        if own := self._own_tokens(record, ids[1:]):
            return Drop("special_token", own)
        try:
            fitted = self._fit(record, ids[0], ids[1:])
        except TemplateError as error:
            return Drop("refused_by_template", f"the chat template, of a part: {error}")
        if isinstance(fitted, Drop):
            return fitted
        tokens, truncated = fitted
        ended = any(self._unended(text) != text for text in (answer_text(a, spaced=False) for a in answers_of(record)))
        if isinstance(record, AnswerRecord):
            chosen, rejected = (tokens[0], None) if record.label else (None, tokens[0])
            return TokenPair(record.id, chosen, rejected, truncated, ended, record.meta)
        if np.array_equal(tokens[0].ids, tokens[1].ids):
            return Drop("equal_after_cut", "both answers are the same in tokens after cutting")
        return TokenPair(record.id, tokens[0], tokens[1], truncated, ended, record.meta)

    def _own_tokens(self, record: Record, answers: Sequence[list[int]]) -> str:
        """What is wrong where a text spells a special token: the model would read a turn's end or another turn."""
        for answer, part in zip(answers_of(record), answers, strict=True):
            written = not isinstance(answer, str) and aside_of(answer[-1])  # by the template, with its own tokens
            if not written and (found := self._own.keys() & part):
                return f"an answer holds {self._own[min(found)]}, a token of the model's own"
        if not self._uses_chat(record.prompt):
            return ""  # a text that was rendered before
        said = [record.prompt] if isinstance(record.prompt, str) else [turn["content"] for turn in record.prompt]
        word = next((word for word in self._own.values() if any(word in text for text in said)), "")
        return (
            word and f"the prompt holds {word}, a token of the model's own; if it is rendered already: --template auto"
        )

    def prompt_text(self, prompt: Text, chat: bool, kwargs: Mapping[str, Any] | None = None) -> str:
        """The prompt as the model meets it, up to where the answer begins. ``kwargs``: what the template is given."""
        if isinstance(prompt, str):
            return self._rendered(user_turn(prompt), chat, kwargs) if chat else prompt
        return self._rendered(prompt, chat, kwargs)

    def _rendered(self, turns: Sequence[Message], chat: bool, kwargs: Mapping[str, Any] | None) -> str:
        if chat:
            return render(self.tokenizer, turns, kwargs)
        plain = [f"\n\n{PLAIN_ROLES.get(turn['role'], turn['role'])}: {turn['content']}" for turn in turns]
        return "".join(plain) + ("" if turns[-1]["role"] == "assistant" else "\n\nAssistant:")

    def _cut(self, record: Record, ids: list[int], limit: int) -> list[int] | None:
        """A prompt's tokens cut to a limit; None where that leaves nothing of its content, or cannot be done: what
        stands beside contents is no content, and a turn that the answer goes on with must stay next to it."""
        text, kwargs = record.prompt, record.template_kwargs
        if limit < 1:
            return None
        keeps_end, chat = self.truncation == "keep_end", self._uses_chat(text)
        if isinstance(text, str) and not chat:
            return ids[-limit:] if keeps_end else ids[:limit]
        turns = user_turn(text) if isinstance(text, str) else text
        if any(map(aside_of, turns)) or (turns[-1]["role"] == "assistant" and not keeps_end):
            return None
        cut = keep_end if keeps_end else keep_start
        whole = self.prompt_text(text, chat, kwargs)
        return cut(turns, whole, limit, lambda some: self._rendered(some, chat, kwargs), self._tokens)

    def _fit(
        self, record: Record, ids: list[int], answers: Sequence[list[int]]
    ) -> tuple[list[TokenAnswer], bool] | Drop:
        prefix = [] if self._uses_chat(record.prompt) else [*self._prefix]
        prompt = prefix + ids
        longest = max(len(answer) for answer in answers) + 1  # and the terminator
        limit = max(self.max_length // 2, self.max_length - longest)
        limit = min(limit, self.max_prompt_length or limit)
        cut_prompt = len(prompt) > limit
        if cut_prompt:
            if self.truncation == "drop":
                return Drop("over_long_prompt", f"{len(prompt)} tokens, {limit} fit")
            kept = self._cut(record, ids, limit - len(prefix))
            if kept is None:
                return Drop("over_long_prompt", f"{len(prompt)} tokens, {limit} fit: too few for what must stay")
            prompt = prefix + kept
        room = self.max_length - len(prompt)
        if longest > room and self.answer_truncation == "drop":
            return Drop("over_long_answer", f"{longest} tokens, {room} fit")
        tokens = []
        for answer in answers:
            ending = [self.terminator] if len(answer) < room else []
            row = np.array([*prompt, *answer[: room - len(ending)], *ending], dtype=np.int32)
            tokens.append(TokenAnswer(row, len(prompt)))
        return tokens, cut_prompt or longest > room


def default_template(tokenizer: Any) -> str:
    """How training renders prompts unless told otherwise: in chat form, strings too, where the tokenizer can."""
    return "chat" if has_template(tokenizer) else "plain"


def beginning_of(tokenizer: Any) -> tuple[int, ...]:
    """The ids that the tokenizer puts before plain text, such as a BOS, whatever part of it puts them."""
    bare, whole = (tokenizer("a", add_special_tokens=special, **QUIET)["input_ids"] for special in (False, True))
    places = [place for place in range(len(whole) - len(bare) + 1) if whole[place : place + len(bare)] == bare]
    if places and places[0]:
        return tuple(whole[: places[0]])
    named = getattr(tokenizer, "add_bos_token", False) and tokenizer.bos_token_id is not None
    return (int(tokenizer.bos_token_id),) if named else ()


def answer_text(answer: Text, *, spaced: bool) -> str:
    """The text of an answer: as it is, or of a message its content (in plain transcripts with the space before it)."""
    if isinstance(answer, str):
        return answer
    content = answer[-1]["content"]
    return f" {content}" if spaced else content
