"""Kills runs at random moments, on disks and clocks that misbehave, and compares each end with that of a run left alone.

    make test-soak                                       # 15 minutes, some 400 kills on two cores
    PYTHONPATH=. python tests/soak.py --minutes 2 --kills 10 --output FILE.json

A run is started, harmed at a random moment and started again, until it ends. Then its losses, the finished weights and those of
its last checkpoint must be the bytes of a run of the same launch that nothing happened to. At each start the seed chooses from:

    a signal         SIGKILL or SIGTERM, to one of the processes or to all of them, after a random time
    the disk         slow (a pause before and after each file), or with room for some files only
    the clock        set back or forward by years, for the process and in the times of all files

and after a kill, at times, a byte of the newest checkpoint is flipped or one of its files cut, if an older checkpoint is
complete. As torchrun does, SIGTERM goes to processes that outlive another one for 5 seconds.

A fault is: another end; a process that hangs; a status or a last line that the documentation does not name; a traceback; a
complete checkpoint that is gone. Exits with status 1 if there was any.
"""

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from importlib.util import find_spec
from pathlib import Path

from fork_server import Process
from launches import fsdp, losses, start, zero
from small_disk import NO_NAMESPACE
from tiny_run import mcd_arguments, mdlm_arguments, start_python, write_inputs

from benchmarks.measuring import write_result
from trainers.checkpoints import checkpoints_in, fault_of, step_of


STEPS, EVERY = 24, 3
PATIENCE, HANGS = 5, 120  # seconds
LANES = 3  # runs at a time
LAST = 30  # of the minutes, the seconds in which runs under way end unharmed
STREAM = {"streaming": True, "shuffle_buffer": 6, "per_device_train_batch_size": 8, "max_steps": STEPS}
STREAM |= {"learning_rate": 1e-2, "logging_steps": 1, "save_steps": EVERY, "save_total_limit": 3, "disable_tqdm": True}
HALVES = {"per_device_train_batch_size": 4}
# Launch -> processes, entry point, settings, environment.
LAUNCHES = {
    "one process": (1, "run_mcd", {}, {}),
    "one process, stream": (1, "run_mdlm", STREAM, {}),
    "DDP-2": (2, "run_mcd", HALVES, {}),
    "FSDP2-2": (2, "run_mcd", HALVES, fsdp("FULL_STATE_DICT")),
    "ZeRO-2 of two": (2, "run_mcd", HALVES, zero(2)),
}
SLOW = """
import random, torch, trainers.teacher, trainers.exact_resume
from transformers.trainer_callback import TrainerState
draw = random.Random({0})
def slowly(function):
    def slow(*a, **k):
        time.sleep(0.2 * draw.random())
        function(*a, **k)
        time.sleep(0.2 * draw.random())
    return slow
torch.save, trainers.teacher.save_file = slowly(torch.save), slowly(trainers.teacher.save_file)
TrainerState.save_to_json = slowly(TrainerState.save_to_json)
trainers.exact_resume.write_manifest = slowly(trainers.exact_resume.write_manifest)
"""
CLOCK = "time.time = lambda now=time.time: now() + {0}\n"
FULL = """
import pathlib, tests.small_disk, trainers.run_mcd
train, folder = trainers.run_mcd.main, pathlib.Path(sys.argv[sys.argv.index("--output_dir") + 1])
trainers.run_mcd.main = lambda words: tests.small_disk.run_on_small_disk(folder.parent, {0}, lambda: train(words))
"""


ONE_AT_A_TIME = threading.Lock()


class Fault(Exception):
    """What must not happen, in words."""


def launch(name: str, inputs: Path, output: Path, before: str = "", staging: Path | None = None) -> list[Process]:
    processes, entry, settings, environment = LAUNCHES[name]
    if entry == "run_mcd":
        settings = {"steps_per_round": STEPS // 3, "save_steps": EVERY, **settings}
        words = mcd_arguments(inputs, output, **settings)
    else:
        words = mdlm_arguments(inputs, output)
        words += [word for key, value in settings.items() for word in (f"--{key}", str(value))]
    if staging is not None:
        words += ["--checkpoint_staging", str(staging)]
    with ONE_AT_A_TIME:  # the server reads orders from one pipe
        return start(words, processes, before, entry, environment)


def end_of(processes: list[Process], hangs: float = HANGS) -> list[int]:
    """Waits for the end of all, for so many seconds at most: their exit statuses."""
    began, failed = time.monotonic(), None
    while running := [process for process in processes if process.poll() is None]:
        now = time.monotonic()
        if failed is None and any(process.poll() for process in processes):
            failed = now
        if failed is not None and now > failed + PATIENCE:
            send(running, signal.SIGTERM)
            failed, began = float("inf"), min(began, now - hangs + 30)
        if now > began + hangs:
            send(running, signal.SIGKILL)
            raise Fault(f"{len(running)} of {len(processes)} processes did not end")
        time.sleep(0.02)
    return [process.poll() for process in processes]


def send(processes: list[Process], number: int):
    for process in processes:
        if process.poll() is None:
            with contextlib.suppress(ProcessLookupError):  # it ended meanwhile
                os.kill(process.pid, number)


def check_words(processes: list[Process], statuses: list[int]):
    """Raises `Fault` unless each process has ended in one of the ways that the documentation names."""
    for process, status in zip(processes, statuses, strict=True):
        said = process.read("err")
        lines = [line for line in said.splitlines() if line.startswith("error: ")]
        if status not in (0, 1, 143, -signal.SIGKILL, -signal.SIGTERM) or (status == 1 and not lines):
            # A process whose error another one says ends with status 1 and no line.
            others = [other for other in processes if other is not process]
            if status != 1 or not any("error: " in other.read("err") for other in others):
                raise Fault(f"status {status}: {said[-2000:]}")
        if "Traceback" in said:
            raise Fault(f"a traceback: {said[-2000:]}")


def digest_of(output: Path) -> str:
    """Of all logged losses, the finished weights, and those of the last checkpoint: student, teacher, EMA."""
    last = output / f"checkpoint-{STEPS}"
    files = [output / "model.safetensors", *sorted(last.rglob("*.safetensors"))]
    digest = hashlib.blake2b(json.dumps(losses(output, STEPS)).encode())
    for file in files:
        digest.update(file.read_bytes())
    if len(losses(output, STEPS)) != STEPS:
        raise Fault(f"{len(losses(output, STEPS))} losses instead of {STEPS}")
    return digest.hexdigest()


def complete_steps(output: Path) -> list[int]:
    """The steps of the checkpoints that can be resumed from, newest first."""
    return [step_of(folder) for folder in checkpoints_in(output) if fault_of(folder) is None]


def damage(output: Path, kind: str, draw: random.Random) -> bool:
    """Damages the newest checkpoint if there is an older one; whether it did."""
    steps = complete_steps(output)
    if len(steps) < 2:
        return False
    files = [path for path in sorted((output / f"checkpoint-{steps[0]}").rglob("*")) if path.is_file()]
    file = draw.choice([path for path in files if path.stat().st_size])
    content = bytearray(file.read_bytes())
    if kind == "file cut":
        content = content[: len(content) // 2]
    else:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
    file.write_bytes(content)
    return True


class Soak:
    """All runs of a soak; `lane` is what each of its threads does."""

    def __init__(self, options: argparse.Namespace, folder: Path, names: list[str]):
        self.options, self.folder, self.names = options, folder, names
        self.inputs, self.began = write_inputs(folder / "inputs"), time.monotonic()
        self.lock, self.stop = threading.Lock(), threading.Event()
        self.started, self.kills, self.staged = 0, 0, 0
        self.runs, self.ended, self.harms, self.faults = Counter(), Counter(), Counter(), []
        self.digests, self.seconds = {}, {}

    def say(self, words: str):
        print(f"{time.monotonic() - self.began:5.0f} s, {self.kills:3d} kills: {words}", flush=True)

    def is_over(self) -> bool:
        late = time.monotonic() - self.began > 60 * self.options.minutes - LAST
        return late or self.stop.is_set() or self.kills >= self.options.kills

    def reference(self, name: str):
        begin, output = time.monotonic(), self.folder / f"alone {name}" / "run"
        processes = launch(name, self.inputs, output)
        statuses = end_of(processes, hangs=600)  # DeepSpeed may compile
        if any(statuses):
            raise Fault(f"left alone, {name} ends with {statuses}: {processes[0].read('err')[-2000:]}")
        self.digests[name], self.seconds[name] = digest_of(output), time.monotonic() - begin
        self.say(f"{name} left alone: {self.seconds[name]:.1f} s")

    def lane(self):
        while not self.is_over():
            with self.lock:
                number = self.started
                self.started += 1
            name, draw = self.names[number % len(self.names)], random.Random(f"{self.options.seed} {number}")
            home, history = self.folder / f"run {number}", []
            home.mkdir()
            try:
                self.one_run(name, home / "run", draw, history)
                self.ended[name] += 1
            except Exception as fault:
                self.faults.append(
                    {"launch": name, "number": number, "harms": history, "fault": f"{type(fault).__name__}: {fault}"}
                )
                self.say(f"FAULT in {name} after {', '.join(history)}: {fault}")
            self.runs[name] += 1
            shutil.rmtree(home, ignore_errors=True)

    def one_run(self, name: str, output: Path, draw: random.Random, history: list[str]):
        while True:
            before, circumstances = self.circumstances(name, draw) if not self.is_over() else ("", [])
            if "clock" in circumstances:
                for file in output.rglob("*"):
                    os.utime(file, (draw.uniform(0, 2e9),) * 2)
            known = complete_steps(output)
            staging = draw.choice((None, self.inputs.parent))
            self.staged += staging is not None
            processes = launch(name, self.inputs, output, before, staging)
            if not self.is_over() and "full disk" not in circumstances:
                circumstances += self.kill(name, processes, draw)
            statuses = end_of(processes)
            if NO_NAMESPACE in statuses:  # no disk can be mounted here
                self.harms["full disk: not possible here"] += 1
                continue
            check_words(processes, statuses)
            steps = complete_steps(output)
            if max(steps, default=0) < max(known, default=0):
                raise Fault(f"checkpoint-{known[0]} was complete and is gone: {steps}")
            if "full disk" in circumstances and not any(statuses):
                circumstances = ["small disk, with room enough"]
            history += circumstances
            self.harms.update(circumstances)
            self.say(f"{name}: {', '.join(circumstances) or 'left alone'}; ended {statuses}; checkpoints {steps}")
            if not any(statuses):
                break
            if not circumstances:
                raise Fault(f"ended with {statuses} by itself: {processes[0].read('err')[-2000:]}")
            kind = draw.choice(("byte flipped", "file cut", None, None))
            if kind is not None and damage(output, kind, draw):
                history.append(kind)
                self.harms[kind] += 1
        if digest_of(output) != self.digests[name]:
            raise Fault("another end than left alone")

    def circumstances(self, name: str, draw: random.Random) -> tuple[str, list[str]]:
        """What is wrong with disk and clock: the code that makes it so, and its names."""
        kinds = draw.choice(([], [], ["slow disk"], ["clock"], ["slow disk", "clock"], ["full disk"]))
        if "full disk" in kinds and LAUNCHES[name][:2] != (1, "run_mcd"):
            kinds = []
        before = SLOW.format(draw.random()) if "slow disk" in kinds else ""
        before += CLOCK.format(draw.uniform(-3e8, 3e8)) if "clock" in kinds else ""
        before += FULL.format(draw.randint(100_000, 2_000_000)) if "full disk" in kinds else ""
        return before, list(kinds)

    def kill(self, name: str, processes: list[Process], draw: random.Random) -> list[str]:
        """Sends a signal after a random time, unless all have ended by then."""
        number, to_all = draw.choice((signal.SIGKILL, signal.SIGTERM)), draw.random() < 0.5
        chosen = processes if to_all else [draw.choice(processes)]
        until = time.monotonic() + draw.uniform(0.1, 0.9) * self.seconds[name]
        while time.monotonic() < until and any(process.poll() is None for process in processes):
            time.sleep(0.01)
        if not any(process.poll() is None for process in chosen):
            return []
        send(chosen, number)
        with self.lock:
            self.kills += 1
        return [f"{number.name} of {'all' if to_all and len(processes) > 1 else 'one'}"]

    def figures(self) -> dict:
        return {
            "seed": self.options.seed,
            "minutes": round((time.monotonic() - self.began) / 60, 1),
            "kills": self.kills,
            "starts with checkpoint_staging": self.staged,
            "harms": dict(sorted(self.harms.items())),
            "runs": dict(self.runs),
            "runs with the same end": dict(self.ended),
            "seconds left alone": {name: round(value, 1) for name, value in self.seconds.items()},
            "faults": self.faults,
        }


def in_threads(calls: list):
    """Makes all calls, as many at a time as there are lanes."""
    left, errors = list(calls), []

    def work():
        while left and not errors:
            try:
                left.pop(0)()
            except Exception as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(LANES)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if errors:
        raise errors[0]


def main():
    parser = argparse.ArgumentParser("soak", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=15, help="when the last run has ended, at the latest")
    parser.add_argument("--kills", type=float, default=float("inf"), help="after so many no more harm is done")
    parser.add_argument("--seed", type=int, default=0, help="of all that is chosen at random")
    parser.add_argument("--launches", nargs="+", choices=LAUNCHES, help="only these")
    parser.add_argument("--output", help="default: benchmarks/results/soak.json")
    options = parser.parse_args()
    names = options.launches or list(LAUNCHES)
    if not (find_spec("deepspeed") and shutil.which("g++") and shutil.which("ninja")):
        names = [name for name in names if "ZeRO" not in name]
    with tempfile.TemporaryDirectory() as folder:
        soak = Soak(options, Path(folder), names)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda *_: soak.stop.set())
        start_python("pass").wait()  # what all runs import is imported once, here
        in_threads([lambda name=name: soak.reference(name) for name in names])
        in_threads([soak.lane] * LANES)
        figures = soak.figures()
    write_result("soak", figures, options.output)
    print(json.dumps(figures, indent=2))
    sys.exit(bool(soak.faults))


if __name__ == "__main__":
    main()
