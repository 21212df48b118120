"""metrics.jsonl: what is written is read, a torn line is not, a resumed run repeats no step."""

from diffdpo.tracking.journal import FILE, Journal, read_journal


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
