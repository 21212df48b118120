"""Seconds by phase: what is inside what, and whose waiting is seen."""

import multiprocessing
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist

from diffdpo.engine.clock import PHASES, Clock, count_waits, timed
from tests.support.ports import free_port

NAP = 0.05


def test_a_phase_inside_another_belongs_to_it_and_a_wait_does_not():
    clock = Clock()
    with clock.phase("backward"):
        time.sleep(NAP)
        with clock.phase("forward"):
            time.sleep(NAP)
        with clock.wait(), clock.wait():
            time.sleep(2 * NAP)
    with clock.wait():
        time.sleep(NAP)
    spent = clock.take()
    assert set(spent) == set(PHASES) and spent["forward"] == 0.0
    assert 2 * NAP <= spent["backward"] < 3 * NAP + 0.5 * NAP
    assert spent["communication"] >= 3 * NAP
    assert not any(clock.take().values())


def test_an_error_ends_a_phase():
    holder = SimpleNamespace(world=SimpleNamespace(clock=Clock()))

    class Engine:
        world = holder.world

        @timed("optimizer")
        def step(self, fails):
            time.sleep(NAP)
            if fails:
                raise ValueError

    with pytest.raises(ValueError):
        Engine().step(True)
    Engine().step(False)
    assert holder.world.clock.take()["optimizer"] >= 2 * NAP


def _late(rank: int, port: int, queue) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    clock = Clock()
    count_waits(Clock())  # of a run before, in the same process
    count_waits(clock)
    numbers = torch.ones(4)
    dist.all_reduce(numbers)
    clock.take()
    with clock.phase("backward"):
        time.sleep(10 * NAP * rank)
        dist.all_reduce(numbers)
        handle = dist.all_gather_into_tensor(torch.empty(8), numbers, async_op=True)
        handle.wait()
    spent = clock.take()
    count_waits(None)
    dist.all_reduce(numbers)
    queue.put((rank, spent["backward"], spent["communication"], sum(clock.take().values())))
    dist.destroy_process_group()


def test_who_waits_for_a_late_process_and_who_does_not():
    context = multiprocessing.get_context("spawn")
    queue, port = context.Queue(), free_port()
    processes = [context.Process(target=_late, args=(rank, port, queue), daemon=True) for rank in range(2)]
    for process in processes:
        process.start()
    try:
        (_, own, waited, after), (_, late_own, late_waited, late_after) = sorted(queue.get(timeout=120) for _ in "ab")
    finally:
        for process in processes:
            process.join(10)
            process.kill()
    assert waited > 5 * NAP > own and late_own >= 10 * NAP and late_waited < 5 * NAP
    assert after == late_after == 0.0
