"""What all stages share: pieces that are done once, a file that is always complete, a clock, and a sign of life."""

import contextlib
import ctypes
import gc
import json
import os
import signal
import subprocess
import sys
import threading
import time
from argparse import Namespace
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.measuring import circumstances
from modeling_mcd.files import write_json


ROOT = Path(__file__).resolve().parents[2]
TICK = 5.0  # seconds between two lines on the screen
GRACE = 5.0  # seconds that a training is given to end before it is killed
PR_SET_PDEATHSIG = 1  # of <sys/prctl.h>
OUT_OF_TIME = 3  # exit status: the same command goes on


class OutOfTimeError(Exception):
    """The minutes of the command are over."""


@dataclass(frozen=True)
class Piece:
    """A part of a stage that is done at once or not at all.

    Args:
        name: also its key in the result file.
        minutes: what it is expected to take on an H100.
        work: does it, and returns its figures.
    """

    name: str
    minutes: float
    work: Callable[[], dict]


@dataclass(frozen=True)
class Goal:
    """What a figure should be, as in `at_most(0.6)`.

    Args:
        words: what is measured.
        aim: the number to reach.
        value: the number that was measured; None where it was not.
        most: whether the aim is an upper bound.
    """

    words: str
    aim: float
    value: float | None
    most: bool = False

    def verdict(self) -> dict:
        if self.value is None:
            return {"goal": self.words, "aim": self.aim, "value": None, "reached": None}
        reached = self.value <= self.aim if self.most else self.value >= self.aim
        return {
            "goal": f"{self.words}, at {'most' if self.most else 'least'} {self.aim:g}",
            "aim": self.aim,
            "value": self.value,
            "reached": reached,
            "missed_by": 0 if reached else self.value / self.aim - 1 if self.aim else self.value,
        }


class Day:
    """The options of a command and its clock; where results, runs and logs go.

    Args:
        options: of the command line.
    """

    def __init__(self, options: Namespace):
        self.options = options
        self.small = options.scale == "cpu"
        self.start, self.deadline = time.monotonic(), time.monotonic() + 60 * options.minutes
        self.runs = Path(options.runs or ROOT / "runs" / ("gpu_rehearsal" if self.small else "gpu_day")).resolve()
        self.results = Path(options.results or ROOT / "benchmarks" / "results").resolve()
        self.device = "cpu" if self.small or not torch.cuda.is_available() else "cuda"
        self.doing, self.detail = "starting", ""

    def file(self, stage: str) -> Path:
        return self.results / f"{'rehearsal_' if self.small else ''}gpu_{stage}.json"

    def read(self, stage: str) -> dict:
        """What the stage's file holds; {} if there is none."""
        with contextlib.suppress(FileNotFoundError):
            return json.loads(self.file(stage).read_text(encoding="utf-8"))
        return {}

    def left(self) -> float:
        """Seconds until the minutes of this command are over."""
        return self.deadline - time.monotonic()

    def say(self, text: str):
        print(f"[{time.monotonic() - self.start:5.0f} s] {text}", flush=True)

    def check_time(self):
        if self.left() <= 0:
            raise OutOfTimeError

    @contextlib.contextmanager
    def sign_of_life(self) -> Iterator[None]:
        """A line every few seconds; ends the process when its time is over, since what is done is saved already."""
        over = threading.Event()

        def tick():
            began, last = time.monotonic(), None
            while not over.wait(TICK):
                if self.doing != last:
                    began, last = time.monotonic(), self.doing
                self.say(f"{self.doing}: {time.monotonic() - began:.0f} s {self.detail}".rstrip())
                if self.left() < -2 * GRACE:
                    self.say("the time is over: the same command goes on where this one was")
                    os._exit(OUT_OF_TIME)

        thread = threading.Thread(target=tick, daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def run(self, *words: str | Path, name: str):
        """Runs a Python script in a process of its own until it ends or time is over; its output goes to a log file.

        Raises:
            OutOfTimeError: it was stopped. A training resumes from its last checkpoint.
            RuntimeError: it failed; the message holds its last line.
        """
        self.check_time()
        log = self.runs / "logs" / f"{name.replace(' ', '_')}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = os.environ | {"PYTHONPATH": path, "PYTHONUNBUFFERED": "1"}
        with log.open("ab") as output:
            process = subprocess.Popen(
                [sys.executable, *map(str, words)],
                env=environment,
                cwd=ROOT,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=end_with_parent,
            )
            try:
                while process.poll() is None and self.left() > 0:
                    self.detail = last_line(log)
                    time.sleep(0.2)
            finally:
                self.detail = ""
                stopped = process.poll() is None
                if stopped:
                    stop(process)
        if stopped:
            raise OutOfTimeError
        if process.returncode:
            raise RuntimeError(f"{name} ended with status {process.returncode}: {last_line(log)} (see {log})")


def end_with_parent():
    """In a new process on Linux: it is killed when this one is, and leaves no lock behind that the next command would meet."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def stop(process: subprocess.Popen):
    """Ends a process and all that it started."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(GRACE)
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_line(log: Path) -> str:
    """The last line of a log that says something, shortened; a progress bar ends with a carriage return."""
    with log.open("rb") as file:
        file.seek(max(0, log.stat().st_size - 4096))
        text = file.read().decode(errors="replace").replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1][:160] if lines else ""


def portable(word: str) -> str:
    """A word of the command without what only this machine has of a path."""
    return Path(word).name if Path(word).is_absolute() else word


def commit() -> str | None:
    """The commit of this checkout, from git or as `make gpu-wheels` noted it; None where neither is there."""
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        command = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    with contextlib.suppress(FileNotFoundError):
        return (ROOT / ".wheels" / "COMMIT").read_text().strip()
    return None


class Stage:
    """The pieces of a stage and its result file.

    Args:
        day: the command.
        name: of the stage.
        pieces: in the order of their worth: what is cut off is worth the least.
        goals: from the figures by the name of their piece to the goals.
        following: what to do when all is done, in words.
    """

    def __init__(
        self, day: Day, name: str, pieces: Iterable[Piece], goals: Callable[[dict], list[Goal]], following: str
    ):
        self.day, self.name, self.pieces, self.goals, self.following = day, name, list(pieces), goals, following

    def unfinished(self) -> list[Piece]:
        done = self.day.read(self.name).get("pieces", {})
        return [piece for piece in self.pieces if "figures" not in done.get(piece.name, {})]

    def write_more(self, **about):
        """Adds or replaces entries of the file that are no pieces."""
        write_json(self.day.file(self.name), {**self.day.read(self.name), **about})

    def write(self, **pieces: dict):
        """Adds pieces to the file, with the circumstances of this command. All or nothing."""
        content = self.day.read(self.name)
        known = content.get("pieces", {}) | pieces
        figures = {name: piece["figures"] for name, piece in known.items() if "figures" in piece}
        left = [piece.name for piece in self.pieces if piece.name not in figures]
        write_json(
            self.day.file(self.name),
            {
                **content,
                "stage": self.name,
                "scale": "a rehearsal on a CPU: no figure here says anything of a GPU" if self.day.small else "gpu",
                "command": " ".join(["python -m benchmarks.gpu_day", *map(portable, self.day.options.words)]),
                "commit": commit(),
                **circumstances(),
                "seconds": sum(piece["seconds"] for piece in known.values()),
                "pieces": known,
                "goals": [goal.verdict() for goal in self.goals(figures)],
                "next": f"the same command: {', '.join(left)}" if left else self.following,
            },
        )

    def run(self) -> bool:
        """Does what is left as long as there is time. Returns whether the stage is complete."""
        self.day.results.mkdir(parents=True, exist_ok=True)
        cut = False
        for piece in self.unfinished():
            self.day.doing, start = f"{self.name}: {piece.name}", time.monotonic()
            self.day.say(f"{self.day.doing} (about {piece.minutes:g} min on an H100)")
            try:
                self.day.check_time()
                outcome = {"figures": piece.work()}
            except OutOfTimeError:
                cut = True
                break
            except Exception as error:  # one piece's fault is no reason to waste the others' time
                outcome = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"}
            outcome |= {"seconds": time.monotonic() - start}
            self.write(**{piece.name: outcome})
            shown = outcome.get("failed") or brief(outcome["figures"])
            self.day.say(f"{piece.name}: {'FAILED: ' if 'failed' in outcome else ''}{shown}")
            free_memory()
        self.write()
        content = self.day.read(self.name)
        for verdict in content["goals"]:
            if verdict["value"] is not None:
                word = "reached" if verdict["reached"] else "missed"
                self.day.say(f"goal {word}: {verdict['goal']}: {verdict['value']:.3g}")
        if cut:
            self.day.say("the time of this command is over")
        self.day.say(f"saved: {self.day.file(self.name)}; next: {content['next']}")
        return not self.unfinished()


def brief(figures: dict) -> str:
    numbers = {key: value for key, value in figures.items() if isinstance(value, int | float)}
    return ", ".join(f"{key} {value:.4g}" for key, value in numbers.items()) or "done"


def free_memory():
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
