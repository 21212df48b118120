"""Damage every file of real checkpoints in every way, and see whether it is told before anything is opened.

    python -m tests.reliability.damages --damages 1000

A damage is silent when the damaged checkpoint is taken; told when it is refused in one line and ``latest`` takes the
sound one before it.
"""

import argparse
import random
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import torch

from diffdpo.engine.world import World
from diffdpo.errors import UserError
from diffdpo.training.checkpoint import find_checkpoint, list_checkpoints
from tests.reliability.runs import ENGINES, flags_for, make_inputs, preload, start

WORLD = World(0, 0, 1, torch.device("cpu"))
Damage = Callable[[Path, Path, random.Random], None]  # the file, the same file of another checkpoint


def one_bit(path: Path, other: Path, chance: random.Random) -> None:
    content = bytearray(path.read_bytes())
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
    path.write_bytes(content)


def zeros(path: Path, other: Path, chance: random.Random) -> None:
    """4 KiB, or as much as there is, where it is not zero yet."""
    content = bytearray(path.read_bytes())
    at = chance.randrange(len(content))
    while not any(content[at : at + 4096]):
        at = chance.randrange(len(content))
    content[at : at + 4096] = bytes(len(content[at : at + 4096]))
    path.write_bytes(content)


def cut(path: Path, other: Path, chance: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: chance.randrange(1, path.stat().st_size)])


def empty(path: Path, other: Path, chance: random.Random) -> None:
    path.write_bytes(b"")


def deleted(path: Path, other: Path, chance: random.Random) -> None:
    path.unlink()


def swapped(path: Path, other: Path, chance: random.Random) -> None:
    """With the file of another checkpoint of the same run; where that is the same to the bit, with a longer one."""
    content = other.read_bytes()
    path.write_bytes(content if content != path.read_bytes() else content + b"\n")


KINDS: dict[str, Damage] = {f.__name__.replace("_", " "): f for f in (one_bit, zeros, cut, empty, deleted, swapped)}


def campaign(outs: dict[str, Path], damages: int, scratch: Path, seed: int) -> tuple[Counter, Counter, list[str]]:
    """(told, silent) by kind, and the silent ones by name; the damages go round all files of all checkpoints."""
    told, silent, names = Counter(), Counter(), []
    chance = random.Random(seed)
    files = [(out, file) for out in outs.values() for file in sorted(list_checkpoints(out)[-1].rglob("*"))]
    files = [(out, file) for out, file in files if file.is_file()]
    kinds = list(KINDS.items())
    for number in range(damages):
        out, file = files[number % len(files)]
        kind, damage = kinds[(number // len(files)) % len(kinds)]
        older, newest = list_checkpoints(out)[-2:]
        copy = scratch / "run"
        shutil.rmtree(copy, ignore_errors=True)
        for path in (older, newest):
            shutil.copytree(path, copy / "checkpoints" / path.name)
        inside = file.relative_to(newest)
        damage(copy / "checkpoints" / newest.name / inside, older / inside, chance)
        if is_told(copy, newest.name, older.name):
            told[kind] += 1
        else:
            silent[kind] += 1
            names.append(f"{kind}: {file}")
    return told, silent, names


def is_told(run: Path, damaged: str, sound: str) -> bool:
    """Refused by name in one line, and passed over for the sound one with a word."""
    said: list[str] = []
    try:
        find_checkpoint(str(run / "checkpoints" / damaged), run, WORLD, said.append)
        return False
    except UserError as error:
        one_line = "\n" not in str(error)
    found = find_checkpoint("latest", run, WORLD, said.append)
    return one_line and found is not None and found.name == sound and len(said) == 1 and "\n" not in said[0]


def make_checkpoints(folder: Path, engines: list[str]) -> dict[str, Path]:
    """A short run of each engine, with two checkpoints at least."""
    inputs, outs = make_inputs(folder), {}
    for engine in engines:
        outs[engine] = folder / engine.replace(" ", "_")
        arguments = [*flags_for(engine, *inputs, outs[engine]), "--max_steps", "5"]
        run = start(arguments, ENGINES[engine][0], outs[engine].with_suffix(".log"))
        if not run.wait(300) or any(run.codes.values()):
            raise RuntimeError(f"{engine}: {run.codes}; see {run.log}")
    return outs


def table(outs: dict[str, Path], told: Counter, silent: Counter) -> str:
    """For docs/reliability.md."""
    count = sum(file.is_file() for out in outs.values() for file in list_checkpoints(out)[-1].rglob("*"))
    lines = ["| damage | told | silent |", "|---|---|---|"]
    lines += [f"| {kind} | {told[kind]} | {silent[kind]} |" for kind in KINDS]
    lines += [f"| all | {told.total()} | {silent.total()} |"]
    return "\n".join([f"{count} files of {len(outs)} checkpoints ({', '.join(outs)})\n", *lines])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--damages", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--engines", default="plain x1,ZeRO-2 offload,ZeRO-3 x2,FSDP2 x2")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="damages-") as name:
        folder = Path(name)
        preload()
        outs = make_checkpoints(folder, given.engines.split(","))
        told, silent, names = campaign(outs, given.damages, folder / "scratch", given.seed)
        print(table(outs, told, silent))
        for text in names:
            print("  silent:", text)


if __name__ == "__main__":
    main()
