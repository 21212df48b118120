"""Multiple choice by score: how many forwards until the choice is right as often as with many, against LLaDA's way.

    python benchmarks/choice_accuracy.py --output docs/benchmarks/choice_accuracy.json

LLaDA's published evaluation (its ``eval_llada.py``) scores a continuation with 128 samples: the number of masked tokens
k is spread evenly over 1..L from a random start, the places are random, each row weighs L / k, and every choice draws
noise of its own. Here it is written anew, plainly, and run on the same questions as ``score_answers``: balanced rows,
one noise for all choices of a question. The model and its tokens are the same, and neither adds a terminator.

The questions are generated arithmetic: the right working among three with one wrong step, under the bundled model; or
real ones made of ``--data``: rows {prompt, chosen, rejected} (a question's right solution among wrong ones to the same
question) or {question, answer} (a question's answer among those of other questions, the nearest in length):

    python benchmarks/choice_accuracy.py --model MODEL --data gsm8k_test_part.jsonl.gz --most_tokens 160

What a method should choose is what the mean of all scores of both methods says ("settled"): a score's noise is what is
compared, so being right counts beside it.

Shape suffixes: N rows, T tokens of a row, L tokens of an answer, Q questions, C choices.
"""

import argparse
import gzip
import json
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_pipeline.generate import generate_choices
from diffdpo.evaluation.estimate import Estimate
from diffdpo.evaluation.score_answers import NamedAnswer, score_answers
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.load import LoadedModel, load_model
from diffdpo.noise.options import NoiseOptions
from diffdpo.scores.masked_log_probs import MaskedLogProbs
from diffdpo.scores.segments import Segments
from diffdpo.settings.noise import NoiseSettings


def published(
    loaded: LoadedModel, answer: NamedAnswer, samples: int, generator: torch.Generator, *, batch: int = 32
) -> float:
    """LLaDA's estimate: padded rows through the whole model and head, cross-entropy over the masked tokens."""
    ids_T = torch.tensor(answer.ids)
    length, start = len(ids_T) - answer.prompt_length, answer.prompt_length
    first = int(torch.randint(1, length + 1, (1,), generator=generator))
    count_N = torch.linspace(first, first + (samples - 1) * (length / samples), steps=samples).round().long()
    count_N = (count_N - 1) % length + 1
    total = 0.0
    for part_N in count_N.split(batch):
        rank_NL = torch.rand(len(part_N), length, generator=generator).argsort(1).argsort(1)
        masked_NL = rank_NL < part_N[:, None]
        rows_NT = ids_T.repeat(len(part_N), 1)
        rows_NT[:, start:][masked_NL] = loaded.spec.mask_token_id
        with torch.no_grad():
            logits_NTV = loaded.model(rows_NT).logits[:, start:].float()
        logp_NL = torch.log_softmax(logits_NTV, -1).gather(-1, ids_T[start:].repeat(len(part_N), 1)[..., None])[..., 0]
        total += float(((logp_NL * masked_NL).sum(1) * length / part_N).sum())
    return total / samples


class Ours:
    """``score_answers`` on one question after the other."""

    def __init__(self, loaded: LoadedModel):
        self.loaded, self.module = loaded, MaskedLogProbs(loaded.model, loaded.spec).eval()

    def __call__(self, answers: list[NamedAnswer], samples: int, seed: int) -> list[float]:
        settings = NoiseSettings(num_mc_samples=samples, seed=seed)
        options = NoiseOptions.of(settings, self.loaded.spec)
        found = score_answers(self.module, answers, options, device=torch.device("cpu"), segments=Segments(tokens=8192))
        return [each.score for each in found]


Question = tuple[int, list[NamedAnswer]]  # (right one, the choices in tokens)


def questions(loaded: LoadedModel, args: argparse.Namespace) -> list[Question]:
    """Those of ``--data`` whose choices all have at most ``--most_tokens``, or generated ones."""
    if args.data is None:
        rows = [(row["question"], row["choices"], row["answer"]) for row in generate_choices(args.questions, seed=0)]
    else:
        rows = [(f"{question}\n", choices, right) for question, choices, right in real_questions(Path(args.data))]
    found = []
    for number, (question, choices, right) in enumerate(rows):
        prompt = loaded.tokenizer(question, add_special_tokens=False)["input_ids"]
        ids = [[*prompt, *loaded.tokenizer(one, add_special_tokens=False)["input_ids"]] for one in choices]
        if args.data is None or max(map(len, ids)) <= args.most_tokens:
            found.append((right, [NamedAnswer(f"choices-{number}", own, len(prompt)) for own in ids]))
    return found[: args.questions]


def real_questions(path: Path) -> Iterator[tuple[str, list[str], int]]:
    """(question, four choices, place of the right one, each place as often), in the file's order."""
    with gzip.open(path, "rt") if path.suffix == ".gz" else path.open() as file:
        rows = [json.loads(line) for line in file]
    choices: dict[str, list[str]] = {}
    if "rejected" in rows[0]:
        for row in rows:
            own = choices.setdefault(row["prompt"], [row["chosen"]])
            own += [row["rejected"]] if row["rejected"] not in own else []
    else:
        by_length = sorted(rows, key=lambda row: len(row["answer"]))
        for place, row in enumerate(by_length):
            first = max(0, min(place - 2, len(rows) - 5))
            around = by_length[first : first + 5]
            choices[row["question"]] = [row["answer"], *(each["answer"] for each in around if each is not row)]
    for number, question in enumerate(dict.fromkeys(row.get("prompt", row.get("question")) for row in rows)):
        own, right = choices[question][:4], number % 4
        if len(set(own)) == 4:
            yield question, [*own[1 : right + 1], own[0], *own[right + 1 :]], right


def measure(args: argparse.Namespace) -> tuple[list[dict[str, Any]], Estimate]:
    """(rows of the table, how far the two ways are apart); a cell is a method, n and repetition."""
    loaded = load_model(model_or_bundled(args.model))
    loaded.model.eval()
    ours, asked, cells = Ours(loaded), questions(loaded, args), []
    for repeat in range(args.repeats):
        for method, numbers in (("published", args.published), ("balanced", args.balanced)):
            for samples in numbers:
                started, scores = time.process_time(), []  # of one thread: other work on the machine does not count
                generator = torch.Generator().manual_seed(1000 * repeat + samples)
                for _, answers in asked:
                    if method == "published":
                        scores.append([published(loaded, each, samples, generator) for each in answers])
                    else:
                        scores.append(ours(answers, samples, repeat))
                seconds = time.process_time() - started
                cells.append({"method": method, "n": samples, "scores": scores, "seconds": seconds})
                print(f"{method} n = {samples}: {seconds:.1f} s", flush=True)
    right = [place for place, _ in asked]
    print(
        f"{len(asked)} questions, {np.mean([len(each.ids) for _, own in asked for each in own]):.0f} tokens on average"
    )
    return report(cells, np.array(right)), agreement(cells, max(args.published), max(args.balanced))


def agreement(cells: list[dict[str, Any]], published_n: int, balanced_n: int) -> Estimate:
    """Published less balanced, each with its most forwards: the mean over choices and repetitions, question by
    question, with the error over questions. Both estimate one bound, so it is 0 but for noise."""
    means_Q = [
        np.mean([np.array(cell["scores"]).mean(1) for cell in cells if (cell["method"], cell["n"]) == each], axis=0)
        for each in (("published", published_n), ("balanced", balanced_n))
    ]
    return Estimate.of(means_Q[0] - means_Q[1])


def report(cells: list[dict[str, Any]], right_Q: np.ndarray) -> list[dict[str, Any]]:
    """Rows of the table: each method and n over its repetitions. A method is held against the mean of the other cells:
    its own noise must not settle what it is judged by."""
    for cell in cells:
        cell["QC"] = np.array(cell["scores"])
    rows = []
    for method, n in dict.fromkeys((cell["method"], cell["n"]) for cell in cells):
        own = [cell for cell in cells if (cell["method"], cell["n"]) == (method, n)]
        others = [cell for cell in cells if (cell["method"], cell["n"]) != (method, n)]
        weight = [cell["n"] for cell in others]
        settled_QC = np.average([cell["QC"] for cell in others], axis=0, weights=weight)
        lead_Q = _lead(settled_QC)
        differences = [_against(cell["QC"], settled_QC) for cell in own]
        as_settled = np.concatenate([(cell["QC"].argmax(1) == settled_QC.argmax(1)) for cell in own])
        accuracy = np.concatenate([cell["QC"].argmax(1) == right_Q for cell in own])
        rows.append(
            {
                "method": method,
                "n": n,
                "noise_of_differences": float(np.sqrt(np.mean(np.concatenate(differences) ** 2))),
                "as_settled": float(as_settled.mean()),
                "accuracy": float(accuracy.mean()),
                "milliseconds_a_question": 1000 * sum(cell["seconds"] for cell in own) / len(own) / len(right_Q),
                "median_lead": float(np.median(lead_Q)),
            }
        )
    return rows


def _against(scores_QC: np.ndarray, settled_QC: np.ndarray) -> np.ndarray:
    """Errors of the differences between choices, which alone decide: each less its question's mean."""
    error_QC = scores_QC - settled_QC
    return (error_QC - error_QC.mean(1, keepdims=True)).ravel()


def _lead(scores_QC: np.ndarray) -> np.ndarray:
    """Of the best choice over the second, in nats."""
    ordered_QC = np.sort(scores_QC, axis=1)
    return ordered_QC[:, -1] - ordered_QC[:, -2]


def table(rows: list[dict[str, Any]]) -> str:
    """In Markdown."""
    lines = [
        "| method | n | noise of a difference, nats | chosen as settled | right | ms a question |",
        "|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {row['method']} | {row['n']} | {row['noise_of_differences']:.2f} | {100 * row['as_settled']:.1f} % "
        f"| {100 * row['accuracy']:.1f} % | {row['milliseconds_a_question']:.0f} |"
        for row in rows
    ]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the bundled model")
    parser.add_argument("--data", help="JSON lines of pairs or of questions with answers; default: generated")
    parser.add_argument("--most_tokens", type=int, default=256, help="longest question of --data with an answer")
    parser.add_argument("--questions", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--published", type=int, nargs="*", default=[8, 16, 32, 128])
    parser.add_argument("--balanced", type=int, nargs="*", default=[4, 8, 16, 32])
    parser.add_argument("--output", help="file for the figures as JSON")
    args = parser.parse_args()
    torch.set_num_threads(1)
    rows, apart = measure(args)
    print(table(rows))
    print(f"\npublished less balanced, each with its most forwards: {apart.mean:+.3f} ± {apart.stderr:.3f} nats")
    if args.output:
        Path(args.output).parent.mkdir(parents=True, exist_ok=True)
        asked = {key: value for key, value in vars(args).items() if key != "output"}
        Path(args.output).write_text(
            json.dumps({"settings": asked, "rows": rows, "agreement": asdict(apart)}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
