"""metrics.jsonl: what is written is read, a torn line is not, a resumed run repeats no step."""

import pytest

from diffdpo.errors import UserError
from diffdpo.tracking.journal import FILE, Journal, read_journal, told_gaps


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
def test_a_damaged_journal_is_repaired_and_says_so_itself(tmp_path, kind):
    damage, told = DAMAGES[kind]
    position, said = journal_of_three(tmp_path), []
    (tmp_path / FILE).write_bytes(damage((tmp_path / FILE).read_bytes()))
    lines = resumed(tmp_path, position, said)
    assert len(said) == 1 and told in said[0]
    assert [told in line.get("note", "") for line in lines].count(True) == 1
    assert lines[-1]["loss"] == 2.0


def test_a_first_line_that_is_gone_is_named(tmp_path):
    """What is left has its lines two steps apart, and so do steps 0 (an evaluation) and 2."""
    journal = Journal(tmp_path)
    for step in (0, 1, 2):
        journal.write(step, {"loss": 1.0})
    position = journal.position()
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
        if step % 2 == 0:  # a checkpoint, whose line is torn off before the run goes on
            position = journal.position()
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
    with pytest.raises(OSError, match="No space"):
        strict = Journal(tmp_path)
        strict.file = Full(strict.file, room=0)
        strict.write(1, {"loss": 1.0})
