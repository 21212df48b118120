"""Diffusion scores of pairs under a model, as JSON lines; with a reference, log-ratios (implicit rewards) too.

    python launch/score.py --model_name_or_path DIR --pairs pairs.jsonl --num_mc_samples 64 > scores.jsonl

A line is {"id", "chosen": {"score", "stderr", "tokens"}, "rejected": {...}}: the ELBO's estimate in nats, summed over
the answer's tokens and its terminator, its standard error (null with one sample; with less than 32 of ``balanced`` too
large, see docs/theory.md, section 4), and how many tokens were scored.
With --output a broken-off run goes on where it stopped. A record whose id was met before is left out.
"""

import json
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from diffdpo.cli.flags import parse_config
from diffdpo.config import ScoreConfig
from diffdpo.errors import UserError

if TYPE_CHECKING:
    from diffdpo.evaluation.score_file import ScoreFile  # imported when it is needed: --help needs no torch
    from diffdpo.evaluation.score_pairs import Scorer

SHARED = (
    *("model_name_or_path", "adapter_name_or_path", "ref_model_name_or_path", "dtype", "load_in_4bit"),
    *("block_size", "score_estimator", "num_mc_samples", "num_diffusion_steps", "fill_last_block", "seed"),
    *("max_length", "max_prompt_length", "truncation", "answer_truncation", "template"),
)
"""Settings that the scores in one file must have in common."""


def main(argv: list[str]) -> None:
    """Score every record of --pairs that --output does not hold yet."""
    config = parse_config(ScoreConfig, argv, __doc__ or "")
    if not config.pairs:
        raise UserError("--pairs is missing: name a file, folder or data set of pairs")
    from diffdpo.noise.estimators import check_estimator

    check_estimator(
        config.score_estimator,
        num_samples=config.num_mc_samples,
        num_diffusion_steps=config.num_diffusion_steps,
        trains=False,
    )
    from data_pipeline.sources.read import records_in

    records = records_in(config.pairs, flag="--pairs")
    from diffdpo.evaluation.score_models import check_models, load_models, model_names, settled
    from diffdpo.evaluation.score_pairs import Scorer

    config, names = settled(config), model_names(config)
    check_models(names, block_size=config.block_size)
    file = open_output(config, names)
    done = len(file.done) if file else 0
    try:
        scorer = Scorer(load_models(names, config), config)
        print(f"scores {scorer.noise.describe(config.score_estimator)}", file=sys.stderr)
        count, repeated = score_all(scorer, records, file)
    finally:
        if file:
            file.close()
    for name, drop in scorer.dropped[:5]:
        print(f"left out {name}: {drop.reason} {drop.detail}".rstrip(), file=sys.stderr)
    if repeated:
        print(f"left out {repeated} whose id another record has", file=sys.stderr)
    print(f"scored {count}, left out {len(scorer.dropped) + repeated}, already there {done}", file=sys.stderr)


def open_output(config: ScoreConfig, names: list[str]) -> "ScoreFile | None":
    """--output, with what it holds already; None: standard output."""
    if not config.output:
        return None
    from diffdpo.evaluation.score_file import ScoreFile

    settings = {name: value for name, value in asdict(config).items() if name in SHARED}
    return ScoreFile(Path(config.output), settings | {"model_weights": _digests(names, config)})


def _digests(names: list[str], config: ScoreConfig) -> list[str]:
    from diffdpo.reference.identity import weights_digest

    base = config.model_name_or_path if config.adapter_name_or_path else None
    return [weights_digest(names[0], base=base), *(weights_digest(name) for name in names[1:])]


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


def score_all(scorer: "Scorer", records: Iterator, file: "ScoreFile | None") -> tuple[int, int]:
    """Write a line a record that is not done; (how many, records met twice)."""
    repeated, digests, count = list[str](), dict[str, str](), 0
    for key, line in scorer(unmet(records, file.done if file else {}, repeated, digests)):
        if file:
            file.write(line, digests.pop(key))
        else:
            print(json.dumps(line, ensure_ascii=False, allow_nan=False))
        (file or sys.stdout).flush()
        count += 1
    return count, len(repeated)
