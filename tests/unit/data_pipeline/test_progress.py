"""Bars where no terminal is: a few whole lines, and nothing that a log file cannot hold."""

import io
import sys

from tqdm import tqdm

from data_pipeline import progress


class Terminal(io.StringIO):
    def isatty(self):
        return True


def lines_of(monkeypatch, seconds: float) -> list[str]:
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    monkeypatch.setattr(progress, "SECONDS", seconds)
    with progress.bar_of(200, "training", unit="step", initial=10) as bar:
        for _ in range(190):
            bar.set_postfix(loss="0.5")
            bar.update()
            tqdm.write("a word", file=file)
    text = file.getvalue().replace("a word\n", "")
    assert "\r" not in text and "\x1b" not in text and text.endswith("\n") and "\n\n" not in text
    return text.splitlines()


def test_a_quick_bar_is_two_lines(monkeypatch):
    first, last = lines_of(monkeypatch, 1000)
    assert first.startswith("training: 10/200 steps") and last.startswith("training: 200/200 steps")
    assert "loss=0.5" in last


def test_a_slow_bar_is_a_line_every_so_often(monkeypatch):
    monkeypatch.setattr(progress.time, "monotonic", iter(range(10_000)).__next__)  # a second a look
    assert 3 < len(lines_of(monkeypatch, 50)) < 30


def test_on_a_terminal_it_is_a_bar_and_other_ranks_are_silent(monkeypatch):
    for shown in (True, False):
        terminal = Terminal()
        monkeypatch.setattr(sys, "stderr", terminal)
        with progress.bar_of(2, "training", unit="step", shown=shown) as bar:
            bar.update(2)
        assert ("\r" in terminal.getvalue()) == shown


def test_work_that_is_mostly_quick_shows_a_bar_only_when_it_is_not(monkeypatch):
    def written(seconds_a_look: float) -> str:
        file, clock = io.StringIO(), iter(range(10_000))
        monkeypatch.setattr(sys, "stderr", file)
        monkeypatch.setattr("tqdm.std.time", lambda: next(clock) * seconds_a_look)
        assert list(progress.with_bar(range(50), 50, "converting", unit="row")) == list(range(50))
        return file.getvalue()

    assert written(0.001) == ""
    assert "converting: 50/50 rows" in written(1.0)


def test_a_bar_that_is_never_moved_ends_with_what_it_began(monkeypatch):
    file = io.StringIO()
    monkeypatch.setattr(sys, "stderr", file)
    progress.bar_of(3, "reference", unit="pair").close()
    assert file.getvalue().splitlines() == ["reference: 0/3 pairs [00:00<?, ?pair/s]"]
