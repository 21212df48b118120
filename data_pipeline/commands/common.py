"""From parsed arguments to options, data sets and encoders; shared by the commands."""

import argparse
from dataclasses import replace
from pathlib import Path

from data_pipeline.convert import ConvertOptions
from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.encode import MAX_LENGTH, MAX_PROMPT_LENGTH, Encoder, default_template
from data_pipeline.errors import DataError
from data_pipeline.shard_builder import BuildOptions
from data_pipeline.sources.candidates import Pairing
from data_pipeline.sources.columns import parse_columns
from data_pipeline.sources.files import SourceOptions
from data_pipeline.tokenizer import load_tokenizer, token_id

ENCODING = ("max_length", "max_prompt_length", "truncation", "answer_truncation", "template", "terminator")
"""Flags of the encoder: arguments only where they were given."""


def build_options(args: argparse.Namespace) -> BuildOptions:
    """The options that ``--format`` and its companions stand for."""
    pairing = Pairing(args.pairing, args.max_pairs, args.use_reference)
    return BuildOptions(
        convert=ConvertOptions(args.format, pairing, columns=parse_columns(args.columns)),
        source=SourceOptions(args.split, args.config, args.cache_dir),
    )


def dataset_of(args: argparse.Namespace) -> ShardedDataset:
    """The data set named on the command line. Malformed rows are skipped with a warning."""
    return open_dataset(
        args.source,
        cache_dir=args.cache_dir,
        eval_fraction=args.eval_fraction,
        split=args.side,
        build_options=replace(build_options(args), on_error="skip"),
        allow_damaged=True,
    )


def check_writable(*paths: Path | None) -> None:
    """DataError for a file that cannot be written: before the work that fills it, not after. Folders are made."""
    for path in paths:
        if path is None:
            continue
        if path.is_dir():
            raise DataError(f"{str(path)!r} is a folder; name a file to write")
        there = path.exists()
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.open("ab").close()
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}") from error
        if not there:
            path.unlink()


def encoder_of(args: argparse.Namespace) -> Encoder | None:
    """The encoder that training has with the same flags; None without ``--tokenizer``."""
    given = {name: getattr(args, name) for name in ENCODING if hasattr(args, name)}
    if not args.tokenizer:
        if given:
            raise DataError(f"--{' and --'.join(given)} count tokens; add --tokenizer, or leave out what needs it")
        return None
    tokenizer, terminator, mask = load_tokenizer(args.tokenizer)
    if "terminator" in given:
        terminator = token_id(tokenizer, given["terminator"])
    longest = given.get("max_length", MAX_LENGTH)
    defaults = {
        "max_length": longest,
        "max_prompt_length": max(1, min(MAX_PROMPT_LENGTH, longest - 1)),
        "template": default_template(tokenizer),
        "forbidden_ids": None if mask is None else (mask,),
    }
    return Encoder(tokenizer, **(defaults | given | {"terminator": terminator}))
