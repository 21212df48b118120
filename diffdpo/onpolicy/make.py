"""``diffdpo make-pairs``: a model's own answers, judged, set against one another and written as shards."""

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from data_pipeline.files import write_whole
from data_pipeline.shard_builder import BuildOptions, build
from diffdpo.config import PairsConfig
from diffdpo.engine.world import World, init_distributed
from diffdpo.errors import UserError
from diffdpo.evaluation.score_models import device_named
from diffdpo.models.bundled import model_or_bundled
from diffdpo.models.load import LoadedModel, load_tokenizer_and_spec, load_with_adapter
from diffdpo.onpolicy.answers import ANSWERS, as_json_lines, open_folder, read_answers, sample_answers
from diffdpo.onpolicy.judging import NOBODY, Scores, Verified, judge_named
from diffdpo.onpolicy.pairing import Judged, pairs_of
from diffdpo.onpolicy.questions import Asked, Question, generated_questions, read_questions
from diffdpo.reference.identity import weights_digest
from diffdpo.sampling.decode import Decoding
from diffdpo.tracking.lock import one_run_in

PAIRS, SHARDS, SUMMARY = "pairs.jsonl", "shards", "summary.json"


@dataclass(frozen=True)
class Made:
    """What came of it. ``counts``: of prompts, answers and pairs, by name; empty where nobody judged."""

    folder: Path
    counts: dict[str, int]

    @property
    def shards(self) -> Path:
        """To be trained on: ``--train_data`` of it."""
        return self.folder / SHARDS


def make_pairs(config: PairsConfig, *, say: Callable[[str], None] = print) -> Made:
    """Sample, judge, pair, write; what is there already is not made again. Every process calls; rank 0 tells."""
    assert config.output_dir is not None
    folder, judge = Path(config.output_dir), None if config.verifier == NOBODY else judge_named(config.verifier)
    check_sampler(config)
    asked = _asked(config)
    if isinstance(judge, Verified):
        judge.check(asked.questions)
    world = init_distributed()
    fingerprint = world.broadcast(_fingerprint(config) if world.is_main else None)
    with one_run_in(folder, world):
        open_folder(folder, _identity(config, asked, fingerprint), world)
        seed, template = config.seed, config.template
        sample_answers(
            folder, asked.questions, config, world, lambda: _load(config, world), seed=seed, template=template
        )
        if not world.is_main:
            return Made(folder, {})
        return _judged(config, folder, asked, judge, fingerprint, say)


def _judged(
    config: PairsConfig,
    folder: Path,
    asked: Asked,
    judge: Scores | Verified | None,
    fingerprint: str,
    say: Callable[[str], None],
) -> Made:
    """Tell what was left out, and pair the answers if somebody judges."""
    for count, what in (
        (asked.repeated, "prompts were met before"),
        (asked.contradicted, "of them with another right result: the first one holds"),
        (asked.unusable, "rows hold no usable prompt"),
    ):
        if count:
            say(f"left out {count} {what}")
    if judge is None:
        say(f"answers  {folder / ANSWERS}; nobody judged them (--verifier none)")
        return Made(folder, {})
    return _pair(config, folder, asked.questions, judge, fingerprint, say)


def check_sampler(config: PairsConfig) -> None:
    """UserError for a model that cannot be read and for options of the sampler that contradict one another or that the
    model cannot serve, before weights are read."""
    name = config.adapter_name_or_path or model_or_bundled(config.model_name_or_path)
    blocks = load_tokenizer_and_spec(name, block_size=config.block_size)[1].block_size
    options = config.decoding()
    Decoding(**options | ({"block_length": config.gen_length} if blocks else {}))


def _asked(config: PairsConfig) -> Asked:
    if config.prompts:
        return read_questions(config.prompts, limit=config.num_prompts or 0)
    return generated_questions(config.num_prompts or 200, seed=config.seed)


def _fingerprint(config: PairsConfig) -> str:
    if config.adapter_name_or_path:
        return weights_digest(config.adapter_name_or_path, base=config.model_name_or_path)
    return weights_digest(model_or_bundled(config.model_name_or_path))


def _identity(config: PairsConfig, asked: Asked, fingerprint: str) -> dict[str, Any]:
    """What decides the answers."""
    sampler = config.decoding() | {name: getattr(config, name) for name in ("num_samples", "batch_size", "seed")}
    sampler |= {"template": config.template, "dtype": config.dtype, "load_in_4bit": config.load_in_4bit}
    sampler |= {} if config.block_size is None else {"block_size": config.block_size}
    return {"checkpoint": fingerprint, "prompts": asked.digest, **sampler}


def _load(config: PairsConfig, world: World) -> LoadedModel:
    device = str(world.device) if config.device == "auto" else device_named(config.device)
    return load_with_adapter(
        config.model_name_or_path,
        config.adapter_name_or_path,
        dtype=config.dtype,
        device=device,
        load_in_4bit=config.load_in_4bit,
        block_size=config.block_size,
    )


def _pair(
    config: PairsConfig,
    folder: Path,
    questions: list[Question],
    judge: Scores | Verified,
    fingerprint: str,
    say: Callable[[str], None],
) -> Made:
    """Judge the answers, and write pairs, shards and a summary."""
    counts: Counter[str] = Counter(prompts=len(questions))
    provenance = {
        "source": "on-policy",
        "checkpoint": fingerprint,
        "sampler": config.sampler() | {"seed": config.seed},
        "verifier": config.verifier,
        "pairing": config.pairing,
    }
    lines, sampled = [], read_answers(folder, questions)
    if isinstance(judge, Scores):
        counts["of_no_answer"] = judge.match([answer for answers in sampled for answer in answers])
    for number, (question, answers) in enumerate(zip(questions, sampled, strict=True)):
        rng = np.random.Generator(np.random.Philox(np.random.SeedSequence([config.seed, number])))
        lines += _records(question, answers, judge, config, rng, counts, provenance)
    told = _told(counts, config)
    if not lines:
        older = f", and {folder / SHARDS} holds the pairs of an earlier call" if (folder / SHARDS).exists() else ""
        raise UserError(f"no pair can be made: {told}; the answers are kept in {folder / ANSWERS}{older}")
    text = as_json_lines(lines)
    file = folder / PAIRS
    if not file.exists() or file.read_bytes() != text:
        shutil.rmtree(folder / SHARDS, ignore_errors=True)  # of other pairs of the same answers
        write_whole(file, text)
    build([str(file)], folder / SHARDS, BuildOptions())
    summary = provenance | {"counts": dict(counts)}
    write_whole(folder / SUMMARY, (json.dumps(summary, indent=1) + "\n").encode())
    say(f"{told}\npairs    {folder / SHARDS}")
    return Made(folder, dict(counts))


def _records(
    question: Question,
    answers: list[dict[str, Any]],
    judge: Scores | Verified,
    config: PairsConfig,
    rng: np.random.Generator,
    counts: Counter[str],
    provenance: dict[str, Any],
) -> list[dict[str, Any]]:
    """The pairs of one question, as rows; ``counts`` learns what it came to."""
    if not answers:
        counts["left_out"] += 1
        return []
    scores = judge(question, answers)
    if scores is None:
        counts["without_truth"] += 1
        return []
    right = sum(score >= config.right_at for score in scores)
    judged = Judged([a["answer"] for a in answers], [a["tokens"] for a in answers], scores)
    pairs = pairs_of(judged, config, rng)
    counts["answers"] += len(answers)
    counts["right"] += right
    counts["empty"] += sum(not text.strip() for text in judged.texts)
    counts["all_right"] += right == len(scores)
    counts["all_wrong"] += right == 0
    counts["without_pair"] += not pairs
    counts["pairs"] += len(pairs)
    own = {"answer": question.stated} if question.stated is not None else {}
    return [
        {
            "id": f"{question.key}/{i}-{j}",
            "prompt": question.prompt,
            "chosen": _side(question.prompt, judged.texts[i]),
            "rejected": _side(question.prompt, judged.texts[j]),
            "meta": own | {"scores": [scores[i], scores[j]], "right": f"{right} of {len(scores)}"} | provenance,
        }
        for i, j in pairs
    ]


def _side(prompt: Any, text: str) -> Any:
    return text if isinstance(prompt, str) else [{"role": "assistant", "content": text}]


def _told(counts: Counter[str], config: PairsConfig) -> str:
    """For the user: what became of the prompts."""
    answers = max(1, counts["answers"])
    parts = [
        f"{counts['pairs']} pairs of {counts['prompts']} prompts",
        f"{counts['right'] / answers:.1%} of {counts['answers']} answers right",
        f"all right: {counts['all_right']} prompts, all wrong: {counts['all_wrong']}",
    ]
    for name, what in (
        ("without_pair", f"{{}} in all without a pair by --pairing {config.pairing} --margin {config.margin:g}"),
        ("without_truth", "{} whose right result the verifier cannot find"),
        ("left_out", "{} that the model cannot be asked (too long, or empty)"),
        ("empty", "{} answers are empty and in no pair"),
        ("of_no_answer", "{} scores are of no answer here"),
    ):
        if counts[name]:
            parts.append(what.format(counts[name]))
    return "; ".join(parts)
