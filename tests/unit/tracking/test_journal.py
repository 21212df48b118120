"""metrics.jsonl: what is written is read, a torn line is not, a resumed run repeats no step."""

from functools import partial

import pytest

from diffdpo.errors import TrainingError, UserError
from diffdpo.tracking.journal import FILE, Journal, read_journal, told_gaps
from diffdpo.training.checkpoint import told_if_unwritable


def write(folder, steps, **options):
    journal = Journal(folder, **options)
    for step in steps:
        journal.write(step, {"loss": step / 2, "bad": float("nan")})
    journal.close()


def test_lines_come_back(tmp_path):
    write(tmp_path, [1, 2])
    assert [(line["step"], line["loss"], line["bad"]) for line in read_journal(tmp_path / FILE)] == [
        (1, 0.5, None),
        (2, 1.0, None),
    ]


def test_a_torn_line_ends_the_reading(tmp_path):
    write(tmp_path, [1, 2])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"step": 3, "lo')
    assert [line["step"] for line in read_journal(tmp_path / FILE)] == [1, 2]


def test_steps_after_the_checkpoint_are_run_and_written_again(tmp_path):
    write(tmp_path, [1, 2, 3, 4])
    with (tmp_path / FILE).open("a") as file:
        file.write('{"torn')
    write(tmp_path, [3, 4, 5], resume_step=2)
    assert [line["step"] for line in read_journal(tmp_path / FILE)] == [1, 2, 3, 4, 5]


def resumed(folder, position, said):
    journal = Journal(folder, resume_step=3, position=position, say=said.append)
    journal.write(4, {"loss": 2.0})
    journal.close()
    return list(read_journal(folder / FILE))


def journal_of_three(folder):
    journal = Journal(folder)
    for step in (1, 2, 3):
        journal.write(step, {"loss": step / 2})
    position = journal.position()
    journal.write(4, {"loss": 9.0})  # after the checkpoint: to be run again
    journal.close()
    return position


def test_an_untouched_journal_goes_on_to_the_bit(tmp_path):
    position, said = journal_of_three(tmp_path), []
    before = (tmp_path / FILE).read_bytes()[: position["bytes"]]
    lines = resumed(tmp_path, position, said)
    assert said == [] and [line["step"] for line in lines] == [1, 2, 3, 4] and lines[-1]["loss"] == 2.0
    assert (tmp_path / FILE).read_bytes().startswith(before)


DAMAGES = {
    "shortened": (lambda raw: raw[: len(raw) // 2 - 5], "1 of 3 lines are left, without steps 2-3"),
    "deleted": (lambda raw: b"", "0 of 3 lines are left, without steps 1-3"),
    "NULs": (lambda raw: raw.replace(b'{"step": 2', bytes(10)), "2 of 3 lines are left, without steps 2"),
    "edited": (lambda raw: raw.replace(b"0.5", b"0.7"), "had been changed before step 3: 3 of 3 lines are left"),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_what_no_checkpoint_keeps_is_gone_and_the_journal_says_so_itself(tmp_path, kind):
    damage, told = DAMAGES[kind]
    position, said = journal_of_three(tmp_path) | {"tail": ""}, []
    (tmp_path / FILE).write_bytes(damage((tmp_path / FILE).read_bytes()))
    lines = resumed(tmp_path, position, said)
    assert len(said) == 1 and told in said[0]
    assert [told in line.get("note", "") for line in lines].count(True) == 1
    assert lines[-1]["loss"] == 2.0


@pytest.mark.parametrize("kind", DAMAGES)
def test_an_end_that_is_lost_is_taken_from_the_checkpoint(tmp_path, kind):
    position, said = journal_of_three(tmp_path), []
    before = (tmp_path / FILE).read_bytes()
    (tmp_path / FILE).write_bytes(DAMAGES[kind][0](before))
    lines = resumed(tmp_path, position, said)
    assert len(said) == 1 and "its end is taken from the checkpoint" in said[0]
    assert (tmp_path / FILE).read_bytes().startswith(before[: position["bytes"]])
    assert [line["step"] for line in lines] == [1, 2, 3, 3, 4] and "its end" in lines[3]["note"]


def long_journal(folder, steps):
    """One that is longer than what a checkpoint keeps of it."""
    journal = Journal(folder)
    for step in range(1, steps + 1):
        journal.write(step, {"loss": step / 2, "of some length": 1.0 / 3})
    position = journal.position()
    journal.close()
    return position, (folder / FILE).read_bytes()


def test_of_a_deleted_journal_the_end_is_left(tmp_path):
    position, whole = long_journal(tmp_path, 1000)
    (tmp_path / FILE).unlink()
    said: list[str] = []
    Journal(tmp_path, resume_step=1000, position=position, say=said.append, every=1).close()
    steps = [line["step"] for line in read_journal(tmp_path / FILE) if "loss" in line]
    assert 100 < len(steps) < 500 and steps == list(range(1001 - len(steps), 1001))
    assert f"{len(steps)} of 1000 lines are left, without steps 1-{1000 - len(steps)}" in said[0]
    assert len(position["tail"]) < len(whole)


def test_lines_edited_at_both_ends_are_there_once(tmp_path):
    position, whole = long_journal(tmp_path, 1000)
    edited = whole.replace(b'"loss": 0.5', b'"loss": 0.75', 1).replace(b'"loss": 500.0', b'"loss": 7.0', 1)
    (tmp_path / FILE).write_bytes(edited)
    said: list[str] = []
    Journal(tmp_path, resume_step=1000, position=position, say=said.append, every=1).close()
    lines = [line for line in read_journal(tmp_path / FILE) if "loss" in line]
    assert [line["step"] for line in lines] == list(range(1, 1001))
    assert (lines[0]["loss"], lines[-1]["loss"]) == (0.75, 500.0)
    assert len(said) == 1 and "1000 of 1000 lines are left" in said[0]


def test_a_first_line_that_is_gone_is_named(tmp_path):
    """What is left has its lines two steps apart, and so do steps 0 (an evaluation) and 2."""
    journal = Journal(tmp_path)
    for step in (0, 1, 2):
        journal.write(step, {"loss": 1.0})
    position = journal.position() | {"tail": ""}
    journal.close()
    (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes().replace(b'{"step": 1', bytes(10)))
    said: list[str] = []
    Journal(tmp_path, resume_step=2, position=position, say=said.append, every=1).close()
    assert len(said) == 1 and "without steps 1" in said[0]


def test_every_gap_is_named_once_however_many_there_were_before(tmp_path):
    """A soak of two hours tore 54 lines off one journal; its notes named the first five again and again."""
    said: list[str] = []
    journal = Journal(tmp_path)
    for step in range(1, 21):
        journal.write(step, {"loss": 1.0})
        if step % 2 == 0:  # an old version's checkpoint, whose line is torn off before the run goes on
            position = journal.position() | {"tail": ""}
            journal.close()
            (tmp_path / FILE).write_bytes((tmp_path / FILE).read_bytes()[:-5])
            journal = Journal(tmp_path, resume_step=step, position=position, say=said.append, every=1)
    journal.close()
    assert [told.partition("without steps ")[2] for told in said] == [str(step) for step in range(2, 21, 2)]
    assert told_gaps(read_journal(tmp_path / FILE)) == set(range(2, 21, 2))


def test_a_folder_in_its_place_is_named(tmp_path):
    (tmp_path / FILE).mkdir()
    with pytest.raises(UserError, match="is a folder"):
        Journal(tmp_path)


class Full:
    """A disk with room for so many bytes."""

    def __init__(self, file, room):
        self.file, self.room = file, room

    def write(self, content):
        taken = content[: self.room]
        self.room -= len(taken)
        if not taken:
            raise OSError(28, "No space left on device")
        return self.file.write(taken)

    def __getattr__(self, name):
        return getattr(self.file, name)


def test_lines_wait_for_room_where_they_may(tmp_path):
    journal = Journal(tmp_path, wait_for_room=True)
    full = journal.file = Full(journal.file, room=70)
    for step in (1, 2, 3):
        journal.write(step, {"loss": float(step)})
    assert [line["step"] for line in read_journal(tmp_path / FILE)] == [1]
    full.room = 10**6
    journal.write(4, {"loss": 4.0})
    assert [line["step"] for line in read_journal(tmp_path / FILE)] == [1, 2, 3, 4]
    with pytest.raises(TrainingError, match=r"cannot be written \(.*No space left.*make room and go on"):
        strict = Journal(tmp_path, told=partial(told_if_unwritable, tmp_path))
        strict.file = Full(strict.file, room=0)
        strict.write(1, {"loss": 1.0})


def test_a_disk_that_fails_at_the_end_hides_nothing(tmp_path, monkeypatch):
    """The end of a run takes an OSError for a record that is not whole, and goes on; a checkpoint is told in full."""
    journal = Journal(tmp_path, told=partial(told_if_unwritable, tmp_path))
    monkeypatch.setattr("os.fsync", lambda number: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(TrainingError, match="make room and go on"):
        journal.sync()
    with pytest.raises(OSError, match="No space"):
        journal.close()
    assert journal.file.closed
