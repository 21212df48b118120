"""A small sample of each campaign in the normal suite; the whole, as docs/reliability.md shows it, with ``-m slow``."""

import pytest


def told(command, python, module: str, *flags: str, timeout: float) -> str:
    done = command([python, "-m", f"tests.reliability.{module}", *flags], timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def rows(text: str) -> dict[str, list[str]]:
    """The last table's cells by the first column."""
    cells = [
        [cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")
    ]
    return {row[0]: row[1:] for row in cells if not set(row[0]) <= {"-"}}


def check_kills(text: str, engines: list[str], kills: int) -> None:
    for engine in engines:
        done, _, _, differing, _, orphans, _ = rows(text)[engine]
        assert int(done) >= kills and differing == "0" and orphans == "0", text


def test_a_few_kills(command, python):
    check_kills(told(command, python, "kills", "--kills", "2", "--engines", "plain x1", timeout=500), ["plain x1"], 2)


def test_a_few_damages(command, python):
    text = told(command, python, "damages", "--damages", "48", "--engines", "plain x1", timeout=500)
    assert rows(text)["all"] == ["48", "0"], text


@pytest.mark.slow
@pytest.mark.timeout(20000)
@pytest.mark.parametrize("engine", ["plain x1", "plain x2", "ZeRO-2 offload", "ZeRO-3 x2", "FSDP2 x2"])
def test_a_hundred_kills(command, python, engine):
    check_kills(told(command, python, "kills", "--kills", "100", "--engines", engine, timeout=20000), [engine], 100)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_thousand_damages(command, python):
    assert rows(told(command, python, "damages", "--damages", "1000", timeout=3600))["all"] == ["1000", "0"]
