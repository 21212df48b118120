"""Answers sampled to many prompts, by any number of processes: in parts, so that what is done survives a kill.

A part is the answers to a few prompts, made in batches that its place alone decides and written whole. So the file is
the same, byte for byte, however many processes made it and however often they were killed.
"""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from data_pipeline.files import whole_or_absent, write_whole
from data_pipeline.progress import bar_of
from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.models.load import LoadedModel
from diffdpo.onpolicy.questions import Question
from diffdpo.sampling.decode import prompt_obstacle, sample
from diffdpo.sampling.prompt import encode_prompt
from diffdpo.settings.sampling import SamplingSettings
from diffdpo.tracking.lock import FILE as LOCK

ANSWERS, PARTS, IDENTITY = "answers.jsonl", "parts", "sampled_with.json"
BATCHES_A_PART = 4  # what a kill can cost


def open_folder(folder: Path, identity: dict[str, Any], world: World) -> None:
    """Begin, or go on in, a folder of answers. UserError where it holds answers that were sampled otherwise."""
    file = folder / IDENTITY
    fault = None
    if world.is_main:
        text = json.dumps(identity, indent=1, sort_keys=True) + "\n"
        if file.exists():
            fault = _difference(json.loads(file.read_text()), json.loads(text), folder)
        elif folder.exists() and any(path.suffix != ".partial" and path.name != LOCK for path in folder.iterdir()):
            fault = f"--output_dir {folder} holds other files; give another"
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_whole(file, text.encode())
    if fault := world.broadcast(fault):
        raise UserError(fault)


def _difference(was: dict[str, Any], now: dict[str, Any], folder: Path) -> str | None:
    for name in sorted(was.keys() | now.keys()):
        if was.get(name) != now.get(name):
            return (
                f"--output_dir {folder} holds answers that were sampled with {name} {was.get(name)}, not "
                f"{now.get(name)}; give another folder, or the settings of that one"
            )
    return None


def sample_answers(
    folder: Path,
    questions: Sequence[Question],
    settings: SamplingSettings,
    world: World,
    load: Callable[[], LoadedModel],
    *,
    seed: int,
    template: str,
) -> None:
    """Make ``answers.jsonl``: a line an answer, {id, prompt, answer, tokens}; {id, prompt, left_out} of a prompt that
    the model cannot be asked. The model is loaded only if something is missing."""
    if world.broadcast((folder / ANSWERS).exists()):
        if world.is_main:  # of a kill just after the file was whole
            shutil.rmtree(folder / PARTS, ignore_errors=True)
        return
    (folder / PARTS).mkdir(exist_ok=True)
    size = max(1, BATCHES_A_PART * settings.batch_size // settings.num_samples)
    starts = range(0, len(questions), size)
    missing = world.broadcast([start for start in starts if not _part(folder, start).exists()])
    mine = missing[world.rank :: world.size]
    loaded = load() if mine else None
    total = sum(len(questions[start : start + size]) for start in mine)
    with bar_of(total, "sampling", unit="prompt", shown=world.is_main) as bar:
        for start in mine:
            assert loaded is not None
            lines = _answer(questions[start : start + size], start, loaded, settings, seed=seed, template=template)
            write_whole(_part(folder, start), as_json_lines(lines))
            bar.update(len(questions[start : start + size]))
    world.barrier()
    if world.is_main:
        with whole_or_absent(folder / ANSWERS) as partial, partial.open("wb") as file:
            for start in starts:
                file.write(_part(folder, start).read_bytes())
        shutil.rmtree(folder / PARTS)
    world.barrier()


def _part(folder: Path, start: int) -> Path:
    return folder / PARTS / f"{start:08d}.jsonl"


def as_json_lines(lines: Sequence[dict[str, Any]]) -> bytes:
    """One JSON object a line."""
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    return text.encode("utf-8", "surrogatepass")


def _answer(
    questions: Sequence[Question],
    first: int,
    loaded: LoadedModel,
    settings: SamplingSettings,
    *,
    seed: int,
    template: str,
) -> list[dict[str, Any]]:
    """The lines of one part. The noise of an answer follows from the seed, its prompt's number and its own."""
    lines, asked = [], []
    for number, question in enumerate(questions, start=first):
        ids, obstacle = _encoded(question, loaded, settings, template)
        if obstacle:
            lines.append({"id": question.key, "prompt": question.prompt, "left_out": obstacle})
            continue
        for k in range(settings.num_samples):
            asked.append((len(lines), ids, (seed, number * settings.num_samples + k)))
            lines.append({"id": f"{question.key}/{k}", "prompt": question.prompt})
    answers = sample(
        loaded.model,
        loaded.spec,
        [ids for _, ids, _ in asked],
        seed=[noise for _, _, noise in asked],
        batch_size=settings.batch_size,
        **settings.decoding(),
    )
    for (place, _, _), tokens in zip(asked, answers, strict=True):
        text = loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        lines[place] |= {"answer": text, "tokens": len(tokens)}
    return lines


def _encoded(
    question: Question, loaded: LoadedModel, settings: SamplingSettings, template: str
) -> tuple[list[int], str]:
    """(tokens, why it cannot be asked)."""
    try:
        ids = encode_prompt(question.prompt, loaded, template)
    except UserError as error:
        return [], str(error)
    return ids, prompt_obstacle(loaded.model, loaded.spec, ids, settings.gen_length)


def read_answers(folder: Path, questions: Sequence[Question]) -> list[list[dict[str, Any]]]:
    """The lines of ``answers.jsonl`` by question; empty where it was left out."""
    found: dict[str, list[dict[str, Any]]] = {question.key: [] for question in questions}
    with (folder / ANSWERS).open("rb") as file:
        for raw in file:
            line = json.loads(raw)
            if "answer" in line:
                found[line["id"].rpartition("/")[0]].append(line)
    return list(found.values())
