"""Diffusion scores of pairs under a model, as JSON lines; with a reference, log-ratios (implicit rewards) too.

    python launch/score.py --model_name_or_path DIR --pairs pairs.jsonl --num_mc_samples 64 > scores.jsonl

A line is {"id", "chosen": {"score", "stderr", "tokens"}, "rejected": {...}}: the ELBO's estimate in nats, summed over
the answer's tokens and its terminator, its standard error (null with one sample; too large for estimators whose rows
are coupled, see docs/theory.md), and how many tokens were scored.
With --output a broken-off run goes on where it stopped. A record whose id was met before is left out.
"""

import json
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffdpo.cli.command import Parser
from diffdpo.errors import UserError

if TYPE_CHECKING:
    from diffdpo.evaluation.score_file import ScoreFile  # imported when it is needed: --help needs no torch


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", required=True, help=".jsonl(.gz), .json, .csv, .parquet, folder or data set")
    parser.add_argument("--model_name_or_path", help="folder or hub name; None: the bundled model")
    parser.add_argument("--ref_model_name_or_path", help="a second model to compare with, under the same noise")
    parser.add_argument("--output", help="file to append to; ids already in it are skipped; None: standard output")
    parser.add_argument("--score_estimator", default="balanced", help="see docs/theory.md")
    parser.add_argument("--num_mc_samples", type=int, default=32, help="forwards a score")
    parser.add_argument("--num_diffusion_steps", type=int, help="T of --score_estimator trajectory")
    parser.add_argument("--seed", type=int, default=0, help="of the noise")
    parser.add_argument("--max_length", type=int, default=1024, help="most tokens of prompt and answer")
    parser.add_argument("--max_prompt_length", type=int, default=512, help="most tokens of the prompt")
    parser.add_argument(
        "--truncation", default="keep_end", choices=("keep_end", "keep_start", "drop"), help="of prompts"
    )
    parser.add_argument("--answer_truncation", default="cut", choices=("cut", "drop"), help="of answers")
    parser.add_argument("--batch_size", type=int, default=8, help="records scored at a time")
    parser.add_argument("--segment_rows", type=int, default=64, help="rows in one forward")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ...")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of the weights")
    return parser


def main(argv: list[str]) -> None:
    """Score every record of --pairs that --output does not hold yet."""
    args = build_parser().parse_args(argv)
    check(args)
    records = read_records(args.pairs)
    check_models(model_names(args))
    file = open_output(args)
    done = len(file.done) if file else 0
    try:
        count, dropped, repeated = score_all(args, records, file)
    finally:
        if file:
            file.close()
    for name, drop in dropped[:5]:
        print(f"left out {name}: {drop.reason} {drop.detail}".rstrip(), file=sys.stderr)
    if repeated:
        print(f"left out {repeated} whose id another record has", file=sys.stderr)
    print(f"scored {count}, left out {len(dropped) + repeated}, already there {done}", file=sys.stderr)


def check(args) -> None:
    """UserError for what can be known wrong before data or model are opened."""
    from diffdpo.noise.estimators import check_estimator

    check_estimator(args.score_estimator, num_samples=args.num_mc_samples, num_diffusion_steps=args.num_diffusion_steps)
    for name in ("batch_size", "segment_rows"):
        if getattr(args, name) < 1:
            raise UserError(f"--{name} is {getattr(args, name)}; it must be at least 1")
    if args.max_length < 3 or not 0 < args.max_prompt_length < args.max_length:
        raise UserError(
            f"--max_prompt_length {args.max_prompt_length} and --max_length {args.max_length} leave no room for a "
            "prompt and an answer; the first must be at least 1 and below the second"
        )
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", args.device):
        raise UserError(f"--device {args.device}: use auto, cpu, cuda or cuda:N")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        raise UserError(f"--output {args.output}: there is no folder {Path(args.output).parent}; make it first")


def open_output(args) -> "ScoreFile | None":
    """--output, with what it holds already; None: standard output."""
    if not args.output:
        return None
    from diffdpo.evaluation.score_file import ScoreFile
    from diffdpo.reference.identity import weights_digest

    names = "model_name_or_path ref_model_name_or_path score_estimator num_mc_samples num_diffusion_steps seed"
    names += " max_length max_prompt_length truncation answer_truncation dtype"
    settings = {name: getattr(args, name) for name in names.split()}  # that scores in one file must share
    digests = [weights_digest(name) for name in model_names(args)]
    return ScoreFile(Path(args.output), settings | {"model_weights": digests})


def read_records(source: str) -> Iterator:
    """Records of --pairs, the first checked now. DataError names the place of a row that cannot be used."""
    from itertools import chain

    from data_pipeline.errors import DataError
    from data_pipeline.records import RecordError
    from data_pipeline.sources.files import SourceOptions, open_rows
    from data_pipeline.sources.formats import convert

    def records() -> Iterator:
        for row in open_rows(source, SourceOptions()):
            try:
                yield from convert(row.parsed())
            except RecordError as error:
                raise DataError(f"--pairs {row.where}: {error}") from None

    found = records()
    first = next(found, None)
    if first is None:
        raise DataError(f"--pairs {source}: no records in it")
    return chain([first], found)


def unmet(records: Iterator, done: Mapping[str, str], repeated: list[str], digests: dict[str, str]) -> Iterator:
    """Records whose id is not ``done`` and was not met before, their digests added to ``digests``; ids met again are
    appended to ``repeated``. UserError where a record that is done was another one."""
    from diffdpo.evaluation.score_file import digest

    met = set[str]()
    for record in records:
        if record.id in met:
            repeated.append(record.id)
        elif record.id not in done:
            digests[record.id] = digest(record)
            yield record
        elif done[record.id] != digest(record):
            raise UserError(
                f"record {record.id!r} of --pairs is not what --output holds the scores of; name another --output"
            )
        met.add(record.id)


def score_all(args, records: Iterator, file: "ScoreFile | None") -> tuple[int, list, int]:
    """Write a line a record that is not done; (how many, what was left out, records met twice)."""
    from data_pipeline.encode import Drop
    from diffdpo.build import make_encoder, make_noise
    from diffdpo.evaluation.score_pairs import as_line, batches, encoded, score_pairs
    from diffdpo.scores.segments import Segments

    models, spec, tokenizer = load_models(args)
    encoder = make_encoder(args, tokenizer, spec)
    noise, segments = make_noise(args, spec), Segments(rows=args.segment_rows)
    dropped, repeated, digests = list[tuple[str, Drop]](), list[str](), dict[str, str]()
    left, count = unmet(records, file.done if file else {}, repeated, digests), 0
    for pairs in batches(encoded(left, encoder, dropped, noise), args.batch_size):
        scores, ratio = score_pairs(pairs, models, noise, segments=segments)
        for index, pair in enumerate(pairs):
            line = as_line(pair, index, scores, ratio)
            if file:
                file.write(line, digests.pop(pair.id))
            else:
                print(json.dumps(line, ensure_ascii=False))
        (file or sys.stdout).flush()
        count += len(pairs)
    return count, dropped, len(repeated)


def model_names(args) -> list[str]:
    """The model, and the reference if one is named."""
    from diffdpo.build import BUNDLED_MODEL

    named = args.model_name_or_path or str(BUNDLED_MODEL), args.ref_model_name_or_path
    return [name for name in named if name]


def check_models(names: list[str]) -> None:
    """UserError for a model without config or tokenizer, and for two of different vocabularies: no weights are read."""
    from diffdpo.models.load import load_tokenizer_and_spec

    vocabularies = [load_tokenizer_and_spec(name)[0].get_vocab() for name in names]
    if vocabularies[0] != vocabularies[-1]:
        raise UserError("--ref_model_name_or_path has another vocabulary than the model; their scores do not compare")


def load_models(args) -> tuple[list, Any, Any]:
    """The models ready to score, the first one's spec and tokenizer."""
    import torch

    from diffdpo.models.load import load_model
    from diffdpo.scores.masked_log_probs import MaskedLogProbs

    device = args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise UserError(f"--device {device}: no GPU is to be found here; use --device cpu")
    loaded = [load_model(name, dtype=args.dtype, device=device) for name in model_names(args)]
    return [MaskedLogProbs(one.model, one.spec).eval() for one in loaded], loaded[0].spec, loaded[0].tokenizer
