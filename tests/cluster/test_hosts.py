"""Several hosts in network namespaces give the curve of as many processes on one host."""

import pytest

from tests.cluster.hosts import (
    by_deepspeed,
    by_hand,
    by_torchrun,
    first_difference,
    hosts,
    on_one_host,
    why_no_deepspeed,
    why_no_hosts,
)

pytestmark = [pytest.mark.slow, pytest.mark.distributed, pytest.mark.timeout(1300)]
COUNT = 2


@pytest.fixture(scope="module")
def members():
    if reason := why_no_hosts():
        pytest.skip(reason)
    with hosts(COUNT) as made:
        yield made


@pytest.fixture(scope="module")
def expected(members, tmp_path_factory):
    found = on_one_host(members[0], COUNT, tmp_path_factory.mktemp("one_host") / "run")
    assert len([line for line in found if "loss" in line]) == 4
    return found


def test_torchrun_with_a_rendezvous(members, expected, tmp_path):
    assert first_difference(by_torchrun(members, tmp_path / "run"), expected) == ""


def test_deepspeed_over_ssh(members, expected, tmp_path):
    if reason := why_no_deepspeed():
        pytest.skip(reason)
    assert first_difference(by_deepspeed(members, tmp_path / "run", tmp_path), expected) == ""


def test_a_difference_would_be_found(expected):
    other = [dict(line) for line in expected]
    other[-1]["loss" if "loss" in other[-1] else "eval/loss"] += 1e-9
    assert "not" in first_difference(other, expected) and "not" in first_difference(other, expected, near=1e-12)
    assert first_difference(other, expected, near=1e-6) == ""
    assert "lines" in first_difference(other[1:], expected)


def test_a_cut_link_is_told_by_name(members, tmp_path):
    timeout = 20
    flags = ("--max_steps", "5000", "--hang_timeout", str(timeout))
    ends = by_hand(members, tmp_path / "run", *flags, limit=120)
    for code, seconds, said in ends:
        print(code, f"{seconds:.0f} s", [line for line in said.splitlines() if line.startswith("error: ")])
    assert [code for code, _, _ in ends] == [4, 4] and max(seconds for _, seconds, _ in ends) < timeout + 20
    line = next(line for line in ends[0][2].splitlines() if line.startswith("error: "))
    assert f"rank 0 on {members[0].name}" in line and f"cannot reach rank 1 on {members[1].name}" in line
