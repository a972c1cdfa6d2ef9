"""What the benchmarks share: peak memory, repeats of each side in turn, the machine and versions, where results go."""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers


class PeakMemory:
    """The most bytes that the process (the GPU, if there is one) held while the context was open.

    `bytes` are above what it held at the start, `total` with it.
    """

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.start = self.bytes_held()
        self.highest, self.open = self.start, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.open:
            self.highest = max(self.highest, self.bytes_held())
            time.sleep(0.002)

    @staticmethod
    def bytes_held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def __exit__(self, *error):
        if torch.cuda.is_available():
            self.highest = torch.cuda.max_memory_allocated()
        else:
            self.open = False
            self.thread.join()
        self.total, self.bytes = self.highest, self.highest - self.start


def count(text: str) -> int:
    """The type of an argument that must be a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, not {value}")
    return value


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def memory_available() -> int:
    """Bytes that a process could still take, on the GPU if there is one."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    lines = Path("/proc/meminfo").read_text().splitlines()
    return 1024 * int(next(line.split()[1] for line in lines if line.startswith("MemAvailable")))


def in_its_own_process(module: str, *words: str, environment: dict[str, str] | None = None) -> dict:
    """What `python -m module words` prints as its last line, JSON; `environment` is added to ours."""
    environment = os.environ | (environment or {})
    output = subprocess.check_output([sys.executable, "-m", module, *words], text=True, env=environment)
    return json.loads(output.strip().splitlines()[-1])


def alternate(sides: Iterable[str], repeats: int, measure: Callable[[str], dict]) -> dict[str, list[dict]]:
    """The results of `measure(side)`, `repeats` of each side, one side after the other in every repeat."""
    runs = {side: [] for side in sides}
    for _ in range(repeats):
        for side, results in runs.items():
            results.append(measure(side))
    return runs


def medians(runs: dict[str, list[dict]], *names: str) -> dict[str, dict[str, float]]:
    """Side -> name -> the median over the side's results."""
    return {side: {n: statistics.median(r[n] for r in results) for n in names} for side, results in runs.items()}


def circumstances() -> dict:
    """The machine and the versions under which figures were taken."""
    machine = {"processor": platform.machine(), "instructions": torch.backends.cpu.get_cpu_capability()}
    machine |= {"cores": os.cpu_count(), "threads": torch.get_num_threads()}
    if torch.cuda.is_available():
        machine["gpu"] = torch.cuda.get_device_name()
    versions = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    return {"machine": machine, "versions": versions}


def write_result(name: str, content: dict, path: str | Path | None = None):
    """Writes `content` and the circumstances to `benchmarks/results/NAME.json`, or to `path`."""
    path = Path(path or Path(__file__).parent / "results" / f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({**content, **circumstances()}, indent=2) + "\n")
