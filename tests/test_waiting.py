"""Work of one process that takes longer than any collective may."""

import subprocess
import sys

import pytest
from tiny_run import ROOT


WORKER = """
import sys, time
from datetime import timedelta
from types import SimpleNamespace
import torch.distributed as dist
from trainers.runs.waiting import main_process_first
rank, place = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", init_method=f"file://{place}/store", rank=rank, world_size=2)
dist.distributed_c10d._set_pg_timeout(timedelta(seconds=1))
training = SimpleNamespace(world_size=2, process_index=rank, local_process_index=rank)
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
    command = [sys.executable, "-c", WORKER]
    options = {"cwd": ROOT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, str(rank), str(tmp_path)], **options) for rank in range(2)]
    (_, first_said), (read, other_said) = [worker.communicate(timeout=300) for worker in workers]
    assert read == "work\nwork\n", other_said
    assert [worker.returncode for worker in workers] == [1, 1] and first_said.endswith("error: no text\n")
    assert "Traceback" not in other_said and "error" not in other_said.lower(), "one process says it"
