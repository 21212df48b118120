"""A process that has done its work ends by itself, also right behind its last collective."""

import os
import subprocess
import sys

TIMES = 10
ENDING = """
import os, sys, tempfile
import torch
import torch.distributed as dist
import diffdpo.engine.world as world

sys.setswitchinterval(100)  # a thread gets the interpreter when this one waits, and not before
statuses = []
for turn in range(int(sys.argv[1])):
    where, children = tempfile.mktemp(), []
    for rank in range(2):
        child = os.fork()
        if child == 0:
            os.environ.update(RANK=str(rank), WORLD_SIZE="2")
            world.meet = lambda rank, size, patience: (dist.FileStore(where, size), None)
            mine = world.init_distributed()
            kept = dist.group.WORLD  # as DeepSpeed keeps it
            for _ in range(20):
                mine.all_gather(torch.randn(1000))
            world.shutdown_distributed()
            sys.exit(0)
        children.append(child)
    statuses += [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
print(statuses)
"""


def test_no_process_is_aborted_because_its_collectives_threads_outlive_their_group():
    command = [sys.executable, "-c", ENDING, str(TIMES)]
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=240, env=env)
    assert done.stdout.split("\n")[-2] == str([0] * 2 * TIMES), done.stderr[-2000:]
