"""Processes that start at once: one process imports the entry points, and every run of a test is a fork of it.

Importing torch, transformers and the trainers takes longer than a tiny run. A fork is a process of its own all the same: it
has its own memory and exit status, and it can be killed.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
from functools import cache
from pathlib import Path


PRELOADED = ("trainers.run_mcd", "trainers.run_mdlm", "trainers.run_judge", "evaluation.run_eval")
PRELOADED_LATE = (
    "deepspeed",
    "tensorboard.summary",
    "torch.utils.tensorboard",
)  # what a run itself imports, if installed


class ForkServer:
    """Runs Python code in forks of one process, which was started with `environment` and has imported `PRELOADED`."""

    def __init__(self, environment: dict[str, str]):
        command = [sys.executable, str(Path(__file__).resolve())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.DEVNULL}
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        atexit.register(self.close)

    def run(self, code: str, *arguments: str, cwd: str | None = None, timeout: float = 600):
        """What `subprocess.run([python, "-c", code, *arguments])` returns, with its output as text."""
        with tempfile.TemporaryDirectory() as folder:
            out, err = Path(folder, "out"), Path(folder, "err")
            order = {"code": code, "arguments": arguments, "cwd": str(cwd or os.getcwd())}
            self.process.stdin.write(json.dumps(order | {"out": str(out), "err": str(err)}) + "\n")
            self.process.stdin.flush()
            started = json.loads(self.process.stdout.readline())
            killer = threading.Timer(timeout, os.kill, (started["pid"], signal.SIGKILL))
            killer.start()
            status = json.loads(self.process.stdout.readline())["status"]
            killer.cancel()
            texts = [file.read_text(encoding="utf-8", errors="replace") for file in (out, err)]
        return subprocess.CompletedProcess(["python", "-c", code, *arguments], status, *texts)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@cache
def server(environment: tuple[tuple[str, str], ...]) -> ForkServer:
    """The server of an environment, started when it is first needed."""
    return ForkServer(dict(environment))


def wait_for_order(answers) -> dict | None:
    """In a fork: what to run. In the server itself, when nobody can give an order any more: None."""
    for line in sys.stdin:
        order = json.loads(line)
        pid = os.fork()
        if pid == 0:
            return order
        print(json.dumps({"pid": pid}), file=answers, flush=True)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        print(json.dumps({"status": status}), file=answers, flush=True)
    return None


if __name__ == "__main__":
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)  # some modules print when they are imported
    for module in PRELOADED:
        importlib.import_module(module)
    for module in PRELOADED_LATE:
        with contextlib.suppress(ImportError):
            importlib.import_module(module)
    gc.freeze()  # a collection in a fork would copy every page that it looks at
    order = wait_for_order(answers)
    if order is not None:
        for descriptor, file, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, order["out"], os.O_WRONLY | os.O_CREAT),
            (2, order["err"], os.O_WRONLY | os.O_CREAT),
        ):
            opened = os.open(file, flags)
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.stdin = open(0)  # not the server's, which has read ahead
        os.chdir(order["cwd"])
        sys.argv = ["-c", *order["arguments"]]
        # From here on the fork ends as any interpreter does: with its exit status, a traceback, and what atexit holds.
        exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
