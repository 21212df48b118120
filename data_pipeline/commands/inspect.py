"""``inspect``: records as a person reads them, and as the model does: token by token, with the boundaries shown."""

import argparse
import json
import re
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np

from data_pipeline.batch import Fault
from data_pipeline.commands.common import dataset_of, encoder_of
from data_pipeline.dataset import ShardedDataset
from data_pipeline.encode import Drop, Encoder, TokenAnswer
from data_pipeline.errors import DataError
from data_pipeline.order import generator
from data_pipeline.reader import describe
from data_pipeline.records import AnswerRecord, Message, Record, Text, aside_of, encode_record
from data_pipeline.stages import RecordReader


def run(args: argparse.Namespace) -> int:
    """Print the records asked for."""
    if args.count < 1:
        raise DataError(f"--count is {args.count}; it must be at least 1")
    try:
        pattern = re.compile(args.filter) if args.filter else None
    except re.error as error:
        raise DataError(f"--filter {args.filter!r} is not a regular expression: {error}") from error
    encoder = encoder_of(args)
    dataset = dataset_of(args)
    shown = 0
    for number, record in _records(dataset, args.sample_seed):
        if isinstance(record, Fault):
            print(f"warning: skipped: {describe(record)}", file=sys.stderr)
            continue
        if (args.id and record.id != args.id) or (pattern and not pattern.search(encode_record(record).decode())):
            continue
        print(show(record, number, encoder))
        shown += 1
        if shown == args.count:
            break
    print(f"{shown} of {len(dataset)} records shown")
    return 0 if shown else 1


def _records(dataset: ShardedDataset, seed: int | None) -> Iterator[tuple[int, Record | Fault]]:
    reader = RecordReader(dataset)
    if seed is not None and seed < 0:
        raise DataError(f"--sample_seed is {seed}; it must be at least 0")
    order = np.arange(len(dataset)) if seed is None else generator(seed).permutation(len(dataset))
    for number in order:
        yield int(number), reader(int(number))
    reader.close()


def show(record: Record, number: int, encoder: Encoder | None) -> str:
    """A record on several lines, then its tokens if there is an encoder."""
    lines = [f"== record {number}, id {record.id}" + "".join(f", {k} {v}" for k, v in record.meta.items())]
    lines += [f"-- {name} (for the template)\n{_value(value)}" for name, value in record.template_kwargs.items()]
    lines.append(_section("prompt", record.prompt))
    if isinstance(record, AnswerRecord):
        lines.append(_section("answer (desirable)" if record.label else "answer (undesirable)", record.answer))
    else:
        lines += [_section("chosen", record.chosen), _section("rejected", record.rejected)]
    if encoder:
        lines += _token_lines(record, encoder)
    return "\n".join(lines) + "\n"


def _section(name: str, text: Text) -> str:
    if isinstance(text, str):
        return f"-- {name}\n{text}"
    return f"-- {name}\n" + "\n".join(map(_turn, text))


def _turn(turn: Message) -> str:
    aside = "".join(f"({name}) {_value(value)} " for name, value in aside_of(turn).items())
    return f"[{turn['role']}] {aside}{turn['content']}"


def _value(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _token_lines(record: Record, encoder: Encoder) -> list[str]:
    pair = encoder(record)
    if isinstance(pair, Drop):
        return [f"-- tokens: dropped, {pair.reason}: {pair.detail}"]
    sides = (("chosen", pair.chosen), ("rejected", pair.rejected))
    return [f"-- tokens, {name}: {tokens(side, encoder)}" for name, side in sides if side]


def tokens(side: TokenAnswer, encoder: Encoder) -> str:
    """``PROMPT n |t|o|k| ANSWER m |e|n|s| TERMINATOR <eos>``; an answer that was cut has no terminator."""
    prompt, answer = side.ids[: side.prompt_length].tolist(), side.ids[side.prompt_length :].tolist()
    ended = bool(answer) and answer[-1] == encoder.terminator
    body = answer[:-1] if ended else answer
    ending = f"TERMINATOR {encoder.tokenizer.decode([encoder.terminator])}" if ended else "CUT, no terminator"
    return f"PROMPT {len(prompt)} {_bars(prompt, encoder)} ANSWER {len(body)} {_bars(body, encoder)} {ending}"


def _bars(ids: list[int], encoder: Encoder) -> str:
    words = [encoder.tokenizer.decode([token]).replace("\n", "\\n") for token in ids]
    return "|" + "|".join(words) + "|"
