"""Work of one process that takes longer than any collective may."""

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
