"""Processes that know one another: who has gone is named within seconds, whatever the others wait in."""

import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist

from diffdpo.engine.companions import FEW, GONE, REACHED, Companions, Member, drain, meet, open_door
from diffdpo.errors import UserError
from tests.support.paths import ROOT
from tests.support.ports import free_port

RANK = """
import sys, time, torch.distributed as dist
from diffdpo.engine.companions import meet
from diffdpo.errors import TrainingError
try:
    store, companions = meet(int(sys.argv[1]), 2, float(sys.argv[2]))
except TrainingError as error:
    print(error, flush=True)
    sys.exit(1)
companions.start()
print("met", len(companions.members), flush=True)
store.wait(["never"])  # as in a collective of NCCL's: nothing breaks off when the other goes
"""


def start(rank: int, port: int, patience: float = 60.0) -> subprocess.Popen:
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(RANK), str(rank), str(patience)],
        env={**os.environ, **own}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


@pytest.fixture
def ranks():
    """``ranks(rank, port, patience)`` starts a process that is ended with the test."""
    started = []

    def begin(*given) -> subprocess.Popen:
        started.append(start(*given))
        return started[-1]

    yield begin
    for process in started:
        process.kill()
        process.wait()


@pytest.mark.timeout(120)
@pytest.mark.parametrize("victim", [0, 1])
def test_who_waits_for_one_that_was_killed_ends_and_names_it(ranks, victim):
    port = free_port()
    both = [ranks(rank, port) for rank in (0, 1)]
    assert [process.stdout.readline() for process in both] == ["met 2\n", "met 2\n"]
    both[victim].send_signal(signal.SIGKILL)
    began = time.monotonic()
    said, _ = both[1 - victim].communicate(timeout=30)
    assert both[1 - victim].returncode == 1 and time.monotonic() - began < 20
    if victim:  # else the store has gone too, which its client tells of at once
        assert f"rank {victim} on {socket.gethostname()} (process {both[victim].pid}) has gone" in said


@pytest.mark.timeout(120)
def test_one_that_does_not_come_is_named(ranks):
    alone = ranks(0, free_port(), 2.0)
    assert "rank 1 of 2 has not come within 2 s" in alone.communicate(timeout=60)[0] and alone.returncode == 1
    port = free_port()
    other = ranks(1, port, 2.0)
    assert f"127.0.0.1:{port}" in other.communicate(timeout=60)[0] and other.returncode == 1


@pytest.mark.parametrize("port", ["0", "", "tcp"])
def test_a_launcher_that_tells_no_port_is_named(monkeypatch, port):
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", port)
    with pytest.raises(UserError, match=r"MASTER_PORT is .*--standalone"):
        meet(1, 2, patience=60.0)


def test_a_store_that_an_earlier_attempt_has_left_its_words_in(monkeypatch):
    """An elastic torchrun keeps its store, and counts attempts otherwise on a host that has seen no process of its own
    fail: the new processes find one another, and none of those before."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    own = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.port), "TORCHELASTIC_USE_AGENT_STORE": "True"}
    for name, value in own.items():
        monkeypatch.setenv(name, value)
    with ThreadPoolExecutor() as pool:
        first = [pool.submit(meet, rank, 2, 60.0) for rank in (1, 0)]
        before = [each.result()[1] for each in first]
        for companions in before:
            companions.door.close()
        late = pool.submit(meet, 1, 2, 60.0)  # comes before rank 0 does, and finds the words of those that have gone
        time.sleep(0.3)
        assert not late.done()
        now = [pool.submit(meet, 0, 2, 60.0).result(), late.result()]
    ports = [companions.door.getsockname()[1] for _, companions in now]
    for store, companions in now:
        assert [member.port for member in companions.members] == ports
        store.add("seen", 1)
        companions.door.close()
    assert all(store.add("seen", 0) == 2 for store, _ in now)


def test_a_frozen_process_is_reached_and_a_dead_one_is_not():
    port = free_port()
    code = f"""
        import time
        from diffdpo.engine.companions import open_door
        door, address = open_door("127.0.0.1", {port})
        print(door.getsockname()[1], flush=True)
        time.sleep(100)
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        member = Member(1, socket.gethostname(), child.pid, "127.0.0.1", int(child.stdout.readline()))
        child.send_signal(signal.SIGSTOP)
        assert member.probe() == REACHED
        child.kill()
        child.wait()
        assert member.probe() == GONE
    finally:
        child.kill()
        child.wait()


def test_a_door_is_drained_and_many_look_at_the_next_one():
    door, address = open_door("127.0.0.1", 1)
    assert address == "127.0.0.1"
    me = Member(0, socket.gethostname(), 1, address, door.getsockname()[1])
    assert [me.probe() for _ in range(3)] == [REACHED] * 3
    drain(door)
    drain(door)
    many = [Member(rank, "host", 1, address, 1) for rank in range(FEW + 2)]
    assert [m.rank for m in Companions(FEW + 1, many, door).others()] == [0]
    assert [m.rank for m in Companions(1, many[:3], door).others()] == [0, 2]
    door.close()


def test_a_rank_that_answers_no_more_is_counted_from_its_last_answer():
    door, _ = open_door("127.0.0.1", 1)
    companions = Companions(0, (), door, last_reached={1: time.monotonic() - 100, 2: time.monotonic()})
    assert list(companions.unreached_for()) == [1] and companions.unreached_for()[1] >= 100
    door.close()
