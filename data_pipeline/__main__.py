"""``python -m data_pipeline build|inspect|stats|verify|generate``. Nothing heavy is imported before a command runs."""

import argparse
import logging
import sys
from pathlib import Path

from data_pipeline.cli import Parser, exit_code, program
from data_pipeline.errors import DataError
from data_pipeline.sources.candidates import POLICIES
from data_pipeline.sources.formats import FORMATS


def _parser() -> Parser:
    parser = Parser(prog=program(), description="Preference data: build, look at, check, generate.")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True, parser_class=Parser)
    _add_build(commands.add_parser("build", help="any source -> shards with an index", description=BUILD_HELP))
    inspect = commands.add_parser("inspect", help="show records, also in tokens", description="Show records readably.")
    _add_source(inspect)
    inspect.add_argument("--count", type=int, default=3, help="how many records")
    inspect.add_argument("--sample_seed", type=int, default=None, help="show a random sample, not the first ones")
    inspect.add_argument(
        "--filter", default=None, help="only records whose stored text matches this regular expression"
    )
    inspect.add_argument("--id", default=None, help="only the record with this id")
    stats = commands.add_parser(
        "stats", help="lengths, duplicates, sources, what truncation loses", description=STATS_HELP
    )
    _add_source(stats)
    stats.add_argument("--plot", type=Path, default=None, help="write histograms to this .png file")
    stats.add_argument("--json", type=Path, default=None, help="write the figures to this file as JSON")
    verify = commands.add_parser("verify", help="check shards against their index", description=VERIFY_HELP)
    verify.add_argument("source", help="folder made by build, or shards (glob, brace list, URLs)")
    verify.add_argument("--cache_dir", type=Path, default=None, help="for what is fetched")
    verify.add_argument(
        "--json", type=Path, default=None, help="write the whole report, every lost record, to this file"
    )
    commands.add_parser("generate", help="arithmetic-reasoning pairs (see generate --help)")
    return parser


BUILD_HELP = "Write shards with an index. Atomic; repeated after an interruption it goes on where it was."
STATS_HELP = "Figures and histograms; with --tokenizer in tokens and with what --max_length cuts."
VERIFY_HELP = "Check every shard and name the records that a damaged one loses. Exit code 1 when something is lost."


def _add_build(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", help="files, folders, URLs or names of data sets on the hub")
    parser.add_argument("--out", type=Path, required=True, help="folder to make")
    parser.add_argument("--shard_size", type=int, default=10_000, help="records a shard")
    parser.add_argument("--shuffle_seed", type=int, default=None, help="shuffle the records once; none: source order")
    parser.add_argument("--eval_fraction", type=float, default=0.0, help="share of the prompts to hold out in OUT/eval")
    _add_format(parser)
    parser.add_argument("--on_error", choices=("raise", "skip"), default="raise", help="at a malformed row")
    parser.add_argument("--max_bytes", type=int, default=0, help="drop records with more text than this; 0: keep all")
    parser.add_argument("--limit", type=int, default=0, help="rows read of each source; 0: all")
    _add_encoding(parser)
    parser.add_argument("--workers", type=int, default=None, help="processes; default: one a core; 0: this one only")
    parser.add_argument("--cache_dir", type=Path, default=None, help="for what is fetched")


def _add_format(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--format", choices=FORMATS, default="auto", help="layout of the rows; auto: by their columns")
    parser.add_argument(
        "--columns", default=None, metavar="NAMES", help="which columns are what, as prompt=question,chosen=good"
    )
    parser.add_argument("--pairing", choices=POLICIES, default="matched", help="candidates: how pairs are made")
    parser.add_argument("--max_pairs", type=int, default=0, help="candidates: pairs a question; 0: no limit")
    parser.add_argument("--use_reference", action="store_true", help="candidates: the human solution is a right answer")
    parser.add_argument("--split", default=None, help="of a data set by name (there: train) or of a folder of files")
    parser.add_argument("--config", default=None, help="configuration of a data set")


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", nargs="+", help="folder made by build, shards, file, URL or name on the hub")
    parser.add_argument("--cache_dir", type=Path, default=None, help="where sources that are no shards are built")
    parser.add_argument("--eval_fraction", type=float, default=0.0, help="share of the prompts held out")
    parser.add_argument("--side", choices=("train", "eval"), default="train", help="of the train/eval split")
    _add_format(parser)
    _add_encoding(parser)


def _add_encoding(parser: argparse.ArgumentParser) -> None:
    """Flags of the encoder, with training's names and defaults. What is not given is not in the namespace."""
    parser.add_argument("--tokenizer", default=None, help="a model, or a tokenizer: figures in its tokens")

    def add(name: str, help: str, **options) -> None:
        parser.add_argument(name, default=argparse.SUPPRESS, help=f"with --tokenizer: {help}", **options)

    add(
        "--template",
        "how prompts are rendered; as training: chat where the tokenizer can",
        choices=("auto", "chat", "plain"),
    )
    add("--terminator", "token (text or id) that ends an answer; as training: the model's", metavar="TOKEN")
    add("--max_length", "tokens of prompt, answer and terminator; 1024", type=int)
    add("--max_prompt_length", "tokens of the prompt; 512", type=int)
    add("--truncation", "of prompts; keep_end", choices=("keep_end", "keep_start", "drop"))
    add("--answer_truncation", "of answers; cut", choices=("cut", "drop"))


def main(argv: list[str]) -> int:
    """Run one command and return its exit code."""
    logging.basicConfig(format="%(levelname)s: %(message)s", level=logging.WARNING)
    if argv[:1] == ["generate"]:
        from data_pipeline.generate import main as generate

        return generate(argv[1:])
    args = _parser().parse_args(argv)
    if args.command == "build":
        from data_pipeline.commands.build import run
    elif args.command == "inspect":
        from data_pipeline.commands.inspect import run
    elif args.command == "stats":
        from data_pipeline.commands.stats import run
    elif args.command == "verify":
        from data_pipeline.commands.verify import run
    else:
        raise DataError(f"unknown command {args.command!r}")
    return run(args)


if __name__ == "__main__":
    for stream in (sys.stdout, sys.stderr):  # texts of any language on a terminal of any encoding
        stream.reconfigure(errors="backslashreplace")  # type: ignore[union-attr]
    sys.exit(exit_code(main, sys.argv[1:]))
