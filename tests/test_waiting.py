"""Work of one process that takes longer than any collective may, and threads that are slower than their process."""

import socket

import pytest
from tiny_run import start_python


WORKER = """
import sys, time
from datetime import timedelta
from types import SimpleNamespace
import torch.distributed as dist
from trainers.runs.waiting import main_process_first, wait_for_all
rank, place = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
training = SimpleNamespace(world_size=2, process_index=rank, local_process_index=rank)
time.sleep(2 * rank)
open(f"{place}/ready{rank}", "w").close()
wait_for_all(training, 2)
open(f"{place}/ready{1 - rank}").close()
for turn in range(3):
    with main_process_first(training, local=turn == 0):
        if rank == 0:
            time.sleep(2)
            if turn == 2:
                sys.exit("error: no text")
            open(f"{place}/{turn}", "w").write("work")
        else:
            print(open(f"{place}/{turn}").read(), flush=True)
"""


@pytest.mark.slow
def test_work_longer_than_the_timeout_of_the_group(tmp_path):
    workers = [start_python(WORKER, str(rank), str(tmp_path)) for rank in range(2)]
    first, other = (worker.complete() for worker in workers)
    assert other.stdout == "work\nwork\n", other.stderr
    assert (first.returncode, other.returncode) == (1, 1) and first.stderr.endswith("error: no text\n")
    assert "Traceback" not in other.stderr and "error" not in other.stderr.lower(), "one process says it"


# A thread that drops the last reference to a tensor and then sleeps, as one without a turn would wait, while the
# interpreter takes its time to end. `kept`: torch and DeepSpeed keep a group in defaults of functions and in modules.
SLOW_THREAD = """
import os, sys, threading, time, weakref
from types import SimpleNamespace
import torch
import torch.distributed as dist
from accelerate import Accelerator
from evaluation.team import launched_team
from trainers.exact_resume import ExactResumeTrainer
rank, port, way = sys.argv[1:]
os.environ |= {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
dropped = threading.Event()

class Slow:
    def __del__(self, sleep=time.sleep):
        sleep(0.6)

slow = Slow()

def drop():
    dropped.set()
    time.sleep(0.3)

def exchange():
    global kept
    kept = dist.group.WORLD
    if rank == "0":
        time.sleep(0.5)
    tensor = torch.ones(1)
    weakref.finalize(tensor, drop).atexit = False
    dist.all_reduce(tensor, async_op=True)
    del tensor
    dropped.wait()

if way == "evaluation":
    with launched_team():
        exchange()
else:
    accelerator = Accelerator(cpu=True)
    exchange()
    ExactResumeTrainer.end(SimpleNamespace(accelerator=accelerator, args=SimpleNamespace(world_size=2)))
"""


@pytest.mark.parametrize("way", ["evaluation", "training"])
def test_a_process_ends_after_the_threads_of_its_group(way):
    with socket.socket() as place:
        place.bind(("127.0.0.1", 0))
        port = str(place.getsockname()[1])
    workers = [start_python(SLOW_THREAD, str(rank), port, way) for rank in range(2)]
    for end in [worker.complete() for worker in workers]:
        assert end.returncode == 0, end.stderr
