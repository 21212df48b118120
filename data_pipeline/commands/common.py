"""From parsed arguments to options, data sets and encoders; shared by the commands."""

import argparse
from dataclasses import replace
from pathlib import Path

from data_pipeline.build import BuildOptions
from data_pipeline.convert import ConvertOptions
from data_pipeline.dataset import ShardedDataset, open_dataset
from data_pipeline.encode import Encoder
from data_pipeline.errors import DataError
from data_pipeline.hub import in_a_line, only_kept
from data_pipeline.sources.candidates import Pairing
from data_pipeline.sources.files import SourceOptions


def build_options(args: argparse.Namespace) -> BuildOptions:
    """The options that ``--format`` and its companions stand for."""
    pairing = Pairing(args.pairing, args.max_pairs, args.use_reference)
    return BuildOptions(
        convert=ConvertOptions(args.format, pairing),
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


def load_tokenizer(name: str):
    """A tokenizer from a folder or the hub; DataError when there is none."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(name, local_files_only=only_kept(name))
    except (DataError, OSError, ValueError, KeyError) as error:
        raise DataError(f"--tokenizer {name!r} cannot be loaded: {in_a_line(error)}") from error


def encoder_of(args: argparse.Namespace) -> Encoder | None:
    """The encoder of ``--tokenizer`` and the truncation options; None without a tokenizer."""
    if not args.tokenizer:
        return None
    return Encoder(
        load_tokenizer(args.tokenizer),
        max_length=args.max_length,
        max_prompt_length=args.max_prompt_length,
        truncation=args.truncation,
        answer_truncation=args.answer_truncation,
        template=args.template,
    )
