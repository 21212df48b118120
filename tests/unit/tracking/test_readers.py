"""Other trackers read the same journal: every point once, read back with their own libraries."""

import json
import time

import pytest

from diffdpo.tracking.journal import Journal
from diffdpo.tracking.readers import SINKS, Reader


def follow(name: str, folder, lines: range, **options) -> Reader:
    journal = Journal(folder, **options)
    reader = Reader(name, folder, "run", "project", {"beta": 0.1})
    reader.start()
    for step in lines:
        journal.write(step, {"loss": 1 / step, "eval/margin": step, "not finite": float("nan")})
    journal.note(lines[-1], "--beta was 0.1")
    journal.close()
    return reader


def points(folder, tag: str) -> list[tuple[int, float]]:
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    found = events.EventAccumulator(str(folder / "tensorboard"))
    found.Reload()
    return [(event.step, event.value) for event in found.Scalars(tag)]


def test_tensorboard_has_every_point_once_also_after_a_resume(tmp_path):
    assert follow("tensorboard", tmp_path, range(1, 31)).close("KILLED", timeout=120)
    assert points(tmp_path, "train/loss") == [(step, pytest.approx(1 / step)) for step in range(1, 31)]
    assert points(tmp_path, "eval/margin")[-1] == (30, 30.0)
    assert follow("tensorboard", tmp_path, range(21, 26), resume_step=20).close("FINISHED", timeout=120)
    assert [step for step, _ in points(tmp_path, "train/loss")] == list(range(1, 26))


def test_wandb_offline_keeps_its_run_over_a_resume(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert follow("wandb", tmp_path, range(1, 6)).close("KILLED", timeout=200)
    first = json.loads((tmp_path / "wandb.json").read_text())
    assert first["last_step"] == 5
    assert follow("wandb", tmp_path, range(4, 8), resume_step=3).close("FINISHED", timeout=200)
    after = json.loads((tmp_path / "wandb.json").read_text())
    assert after["id"] == first["id"] and after["last_step"] == 7
    (one, two) = sorted((tmp_path / "wandb").glob("offline-run-*"))
    until = time.monotonic() + 60
    while len(steps_of(two)) < 2 and time.monotonic() < until:
        time.sleep(0.1)  # wandb's own process writes the file, and has not always done so when a run is finished
    assert steps_of(one) == [1, 2, 3, 4, 5] and steps_of(two) == [6, 7]


def steps_of(folder) -> list[int]:
    """The steps of the history in an offline run's file."""
    from wandb.proto import wandb_internal_pb2 as messages

    (path,) = folder.glob("*.wandb")
    steps = []
    for content in records_of(path.read_bytes()):
        record = messages.Record()
        record.ParseFromString(content)
        if record.HasField("history"):
            values = {item.key or "/".join(item.nested_key): item.value_json for item in record.history.item}
            steps.append(int(values["_step"]))
    return steps


def records_of(data: bytes):
    """The records of a file in LevelDB's log format (blocks of 32 KiB, pieces of checksum, length and kind), which
    begins with seven bytes of wandb's own."""
    at, whole = 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
            continue
        length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # the whole record, or its last piece
            yield whole
            whole = b""


def test_a_tracker_that_breaks_or_never_answers_holds_nobody(tmp_path, monkeypatch):
    class Breaks:
        def __init__(self, *_):
            raise RuntimeError("no such server")

    class Sleeps(Breaks):
        def __init__(self, *_):
            time.sleep(30)

    monkeypatch.setitem(SINKS, "breaks", Breaks)
    monkeypatch.setitem(SINKS, "sleeps", Sleeps)
    broken, asleep = follow("breaks", tmp_path, range(1, 3)), follow("sleeps", tmp_path, range(1, 3))
    assert broken.close("FINISHED", timeout=10) is False and "no such server" in str(broken.error)
    began = time.monotonic()
    assert asleep.close("FINISHED", timeout=0.5) is False and time.monotonic() - began < 5
