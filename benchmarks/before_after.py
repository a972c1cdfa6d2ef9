"""An earlier state of the code against the working tree, in one run: how long sampling and a step of distillation take.

    python -m benchmarks.before_after --before REV                  # both workloads at the 169M shape, 128 tokens
    python -m benchmarks.before_after --before REV --sampling --length 1024 --pairs 4
    python -m benchmarks.before_after --before REV --layers 2 --hidden_size 64 --vocab_size 1000 --processes 1    # seconds

REV is any commit; its files are unpacked into a temporary folder. Both trees run `benchmarks/workloads.py` of the working
tree, each in a process of its own with PYTHONPATH set to the tree. The two processes live side by side and are called in
turn, in the order ABBA: what slows the machine down for a while slows both sides. Each process warms up with one call.
`--processes` counts the pairs of processes, `--pairs` the timed calls of each; `ratio` is the median over all of them of
after / before, `spread` its quartiles. `same_results` says whether both trees gave the same tokens or the same losses.

Writes `benchmarks/results/before_after_sampling.json` and `before_after_step.json`.
"""

import argparse
import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from benchmarks.measuring import count, write_result
from benchmarks.workloads import SHAPE, WORKLOADS, add_shape


ROOT = Path(__file__).resolve().parent.parent


def git(*words: str) -> str:
    return subprocess.run(["git", "-C", str(ROOT), *words], check=True, capture_output=True, text=True).stdout.strip()


@contextlib.contextmanager
def tree_of(revision: str) -> Iterator[Path]:
    """The files of a commit in a temporary folder."""
    with tempfile.TemporaryDirectory(prefix="before_") as folder:
        archive = subprocess.Popen(["git", "-C", str(ROOT), "archive", revision], stdout=subprocess.PIPE)
        subprocess.run(["tar", "-x", "-C", folder], stdin=archive.stdout, check=True)
        yield Path(folder)


class Worker:
    """A process that runs a workload in a tree and times one call whenever it is asked."""

    def __init__(self, workload: str, tree: Path, shape: dict[str, int]):
        words = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
        script = [sys.executable, str(ROOT / "benchmarks" / "workloads.py"), workload, "--tree", str(tree), *words]
        environment = {**os.environ, "PYTHONPATH": str(tree)}
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen(script, env=environment, cwd=tree, text=True, **pipes)

    def call(self) -> dict:
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        while line := self.process.stdout.readline():
            with contextlib.suppress(json.JSONDecodeError):  # whatever else a library prints
                return json.loads(line)
        raise SystemExit(f"error: the workload ended with status {self.process.wait()}: see its complaint above")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.process.stdin.close()
        self.process.wait()


def compare(workload: str, before: Path, shape: dict[str, int], processes: int, pairs: int) -> dict:
    timed, same = [], True
    for _ in range(processes):
        with Worker(workload, before, shape) as old, Worker(workload, ROOT, shape) as new:
            for pair in range(pairs + 1):
                order = {"before": old, "after": new}
                order = order if pair % 2 else dict(reversed(order.items()))
                results = {side: worker.call() for side, worker in order.items()}
                same = same and results["before"]["value"] == results["after"]["value"]
                if pair > 0:  # the first warms up
                    timed.append({side: results[side]["seconds"] for side in ("before", "after")})
                    print(
                        f"{workload}: before {timed[-1]['before']:.3f} s, after {timed[-1]['after']:.3f} s", flush=True
                    )
    ratios = [pair["after"] / pair["before"] for pair in timed]
    low, ratio, high = statistics.quantiles(ratios, n=4, method="inclusive")
    seconds = {side: statistics.median(pair[side] for pair in timed) for side in ("before", "after")}
    return {"ratio": ratio, "spread": [low, high], "same_results": same, "seconds": seconds, "pairs": timed}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", required=True, metavar="REV", help="the commit to compare the working tree with")
    for name, workload in WORKLOADS.items():
        parser.add_argument(f"--{name}", action="store_true", help=f"time only this: {workload.__doc__.split(';')[0]}")
    parser.add_argument("--processes", type=count, default=3, help="pairs of processes")
    parser.add_argument(
        "--pairs", type=count, default=6, help="timed pairs of calls in each pair of processes; at least 2"
    )
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="where the JSON files go"
    )
    add_shape(parser)
    options = parser.parse_args()
    if options.processes < 1 or options.pairs < 2:
        parser.error("processes must be at least 1 and pairs at least 2")
    chosen = [name for name in WORKLOADS if getattr(options, name)] or list(WORKLOADS)
    shape = {name: getattr(options, name) for name in SHAPE}
    before = git("rev-parse", "--verify", options.before + "^{commit}")
    after = git("rev-parse", "HEAD") + (
        " with changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    )
    with tree_of(before) as tree:
        for workload in chosen:
            result = compare(workload, tree, shape, options.processes, options.pairs)
            print(
                f"{workload}: {result['ratio']:.3f} times as long as before ({result['spread'][0]:.3f} to "
                f"{result['spread'][1]:.3f} for the middle half of {len(result['pairs'])} pairs); "
                f"{'the same results' if result['same_results'] else 'OTHER RESULTS THAN BEFORE'}"
            )
            name = f"before_after_{workload}"
            content = {"before": before, "after": after, "shape": shape, **result}
            write_result(name, content, options.results / f"{name}.json")


if __name__ == "__main__":
    main()
