"""The embedded data: arithmetic preference pairs, and the answers of mixed quality a model is first taught on.

Record i is a pure function of (seed, split, i). Which split a question belongs to is decided by a hash of the question
itself, so no question of the ``eval`` split is ever met in ``train``, whatever the seeds.
"""

import gzip
import hashlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from data_pipeline.arithmetic import FLAWS, LARGEST_NUMBER, PROBLEM_KINDS, Problem, clear_answer, draw_problem
from data_pipeline.cli import Parser, program
from data_pipeline.errors import DataError
from data_pipeline.files import whole_or_absent
from data_pipeline.progress import with_bar

GENERATOR_VERSION = 1  # to be raised when the same seed gives other records
SPLITS = ("train", "eval")
EVAL_BUCKETS = 10  # one question in ten is held out
# The share of each kind of answer in the supervised corpus: like text found in the wild, not all of it is good.
QUALITIES = ("clear", *FLAWS)
CORPUS_MIX = {"clear": 0.40, "wrong_step": 0.30, "cut_short": 0.10, "vague": 0.10, "long_winded": 0.10}


def question_split(question: str) -> str:
    """``eval`` for one question in ten, by its text alone."""
    bucket = int.from_bytes(hashlib.blake2b(question.encode(), digest_size=8).digest(), "big") % EVAL_BUCKETS
    return "eval" if bucket == 0 else "train"


def draw(
    seed: int, split: str, index: int, *, kinds: Sequence[str], difficulties: Sequence[str]
) -> tuple[Problem, np.random.Generator]:
    """Problem ``index`` of a split, and the generator from which the rest of its record is drawn."""
    rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, SPLITS.index(split), index])))
    while True:
        problem = draw_problem(rng, kinds=tuple(kinds), difficulty=str(rng.choice(list(difficulties))))
        if question_split(problem.question) == split:
            return problem, rng


def generate_pairs(
    count: int,
    *,
    seed: int,
    split: str = "train",
    kinds: Sequence[str] = tuple(PROBLEM_KINDS),
    flaws: Sequence[str] = tuple(FLAWS),
    difficulties: Sequence[str] = ("easy",),
) -> Iterator[dict]:
    """``count`` records {id, prompt, chosen, rejected, meta}: the clear right answer against one flaw, in turn."""
    for index in range(count):
        problem, rng = draw(seed, split, index, kinds=kinds, difficulties=difficulties)
        flaw = flaws[index % len(flaws)]
        yield {
            "id": f"arithmetic-{split}-{seed}-{index:07d}",
            "prompt": prompt_of(problem),
            "chosen": clear_answer(problem),
            "rejected": FLAWS[flaw](problem, rng),
            "meta": {"source": "generated", "flaw": flaw, "problem": problem.kind, "answer": str(problem.answer)},
        }


def generate_corpus(
    count: int,
    *,
    seed: int,
    split: str = "train",
    kinds: Sequence[str] = tuple(PROBLEM_KINDS),
    difficulties: Sequence[str] = ("easy",),
    mix: dict[str, float] | None = None,
) -> Iterator[dict]:
    """``count`` records {id, prompt, completion, meta} for supervised training, of mixed quality (``CORPUS_MIX``)."""
    shares = mix or CORPUS_MIX
    names, weights = list(shares), np.array(list(shares.values())) / sum(shares.values())
    for index in range(count):
        problem, rng = draw(seed, split, index, kinds=kinds, difficulties=difficulties)
        quality = str(rng.choice(names, p=weights))
        yield {
            "id": f"corpus-{split}-{seed}-{index:07d}",
            "prompt": prompt_of(problem),
            "completion": clear_answer(problem) if quality == "clear" else FLAWS[quality](problem, rng),
            "meta": {"source": "generated", "quality": quality, "problem": problem.kind},
        }


def generate_choices(count: int, *, seed: int, split: str = "eval", choices: int = 4) -> Iterator[dict]:
    """``count`` questions {id, question, choices, answer, meta}: a right worked answer among ones with a wrong step.

    The right one stands at any place alike, and wrong ones end in other numbers, no two alike.
    """
    for index in range(count):
        problem, rng = draw(seed, split, index, kinds=tuple(PROBLEM_KINDS), difficulties=("easy",))
        right, wrong = clear_answer(problem), dict[str, None]()
        while len(wrong) < choices - 1:
            wrong.setdefault(FLAWS["wrong_step"](problem, rng))
        place = int(rng.integers(choices))
        texts = list(wrong)
        yield {
            "id": f"choices-{split}-{seed}-{index:07d}",
            "question": prompt_of(problem),
            "choices": [*texts[:place], right, *texts[place:]],
            "answer": place,
            "meta": {"source": "generated", "problem": problem.kind},
        }


def prompt_of(problem: Problem) -> str:
    """The question as the model is asked it."""
    return f"{problem.question}\n"


def write_jsonl(records: Iterator[dict], path: Path) -> int:
    """Write records as JSON lines (gzip when the name ends in .gz), atomically. Returns how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with whole_or_absent(path) as partial, partial.open("wb") as raw:
        # mtime=0 and no file name: the same records give the same bytes
        file = gzip.GzipFile(filename="", fileobj=raw, mode="wb", mtime=0) if path.suffix == ".gz" else raw
        for record in records:
            file.write(json.dumps(record, ensure_ascii=False).encode() + b"\n")
            count += 1
        if file is not raw:
            file.close()
    return count


def parse_mix(text: str) -> dict[str, float]:
    """``clear=0.5,vague=0.5`` → shares by quality. DataError for anything else."""
    try:
        mix = {name.strip(): float(share) for name, share in (part.split("=") for part in text.split(","))}
    except ValueError:
        mix = {}
    if not mix or not set(mix) <= set(QUALITIES) or min(mix.values()) < 0 or sum(mix.values()) <= 0:
        raise DataError(f"mix {text!r}: give shares such as clear=0.6,vague=0.4; qualities: {', '.join(QUALITIES)}")
    return mix


def _chosen_from(text: str, allowed: Sequence[str], option: str) -> list[str]:
    names = [name.strip() for name in text.split(",") if name.strip()]
    unknown = [name for name in names if name not in allowed]
    if unknown or not names:
        raise DataError(f"{option} has {', '.join(unknown) or 'nothing'}; allowed: {', '.join(allowed)}")
    return names


def main(argv: list[str]) -> int:
    """``python -m data_pipeline generate``."""
    parser = Parser(
        prog=f"{program()} generate",
        description="Write arithmetic-reasoning preference pairs (or, with --corpus, single answers) as JSON lines.",
    )
    parser.add_argument("--out", default="-", help="a .jsonl or .jsonl.gz file; - is standard output")
    parser.add_argument("--count", type=int, default=1000, help="how many records")
    parser.add_argument("--seed", type=int, default=0, help="the same seed gives the same records")
    parser.add_argument("--split", default="train", choices=SPLITS, help="no question stands in both")
    parser.add_argument("--kinds", default=",".join(PROBLEM_KINDS), help="problem kinds, comma-separated")
    parser.add_argument("--flaws", default=",".join(FLAWS), help="what the rejected answers do wrong, comma-separated")
    parser.add_argument(
        "--difficulty", default="easy", help=f"one or more of {','.join(LARGEST_NUMBER)}, comma-separated"
    )
    parser.add_argument("--corpus", action="store_true", help="single answers of mixed quality for launch/sft.py")
    usual = ",".join(f"{name}={share}" for name, share in CORPUS_MIX.items())
    parser.add_argument("--mix", default=usual, help="with --corpus: the share of each quality")
    args = parser.parse_args(argv)
    if args.count < 1 or args.seed < 0:
        raise DataError(
            f"--count {args.count} --seed {args.seed}: the count must be at least 1 and the seed at least 0"
        )
    kinds = _chosen_from(args.kinds, tuple(PROBLEM_KINDS), "--kinds")
    difficulties = _chosen_from(args.difficulty, tuple(LARGEST_NUMBER), "--difficulty")
    shared = {"seed": args.seed, "split": args.split, "kinds": kinds, "difficulties": difficulties}
    if args.corpus:
        records = generate_corpus(args.count, mix=parse_mix(args.mix), **shared)
    else:
        records = generate_pairs(args.count, flaws=_chosen_from(args.flaws, tuple(FLAWS), "--flaws"), **shared)
    if args.out == "-":
        for record in records:
            print(json.dumps(record, ensure_ascii=False))
    else:
        written = write_jsonl(with_bar(records, args.count, "generating", unit="record"), Path(args.out))
        print(f"{written} records written to {args.out}", file=sys.stderr)
    return 0
