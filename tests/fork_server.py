"""Processes that start at once: a server imports what takes long, and every process of a test is a fork of it.

Importing torch, transformers and the trainers takes longer than a tiny run. A fork is a process of its own all the same: it
has its own memory and exit status, and it can be killed. There are two servers in one: a plain process has imported nothing of
this library, and another one, started when it is first asked for, the entry points too.
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
import time
from functools import cache
from pathlib import Path


FOREIGN = ("torch", "transformers.models.auto.modeling_auto", "transformers.models.auto.tokenization_auto")
LIBRARY = ("trainers.run_mcd", "trainers.run_mdlm", "trainers.run_judge", "evaluation.run_eval")
IF_INSTALLED = ("deepspeed", "tensorboard.summary", "torch.utils.tensorboard")  # what a run itself imports


class Process:
    """A process that a server has started, with what `subprocess.Popen` offers for one: `pid`, `poll`, `wait`, `kill`."""

    def __init__(self, server: "ForkServer", code: str, arguments: tuple[str, ...], cwd: str | None, plain: bool):
        self.arguments, self.folder = ["python", "-c", code, *arguments], tempfile.TemporaryDirectory()
        order = {"code": code, "arguments": arguments, "cwd": str(cwd or os.getcwd()), "plain": plain}
        server.process.stdin.write(json.dumps(order | {"folder": self.folder.name}) + "\n")
        server.process.stdin.flush()
        while (pid := self.read("pid")) == "":
            assert server.process.poll() is None, "the server has ended"
            time.sleep(0.002)
        self.pid = int(pid)

    def read(self, name: str) -> str:
        file = Path(self.folder.name, name)
        return file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""

    def poll(self) -> int | None:
        return int(status) if (status := self.read("status")) else None

    def kill(self):
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.pid, signal.SIGKILL)

    def wait(self, timeout: float = 600) -> int:
        end = time.monotonic() + timeout
        while (status := self.poll()) is None:
            if time.monotonic() > end:
                self.kill()
            time.sleep(0.005)
        return status

    def complete(self, timeout: float = 600) -> subprocess.CompletedProcess:
        """Waits for the end: what `subprocess.run` returns, with the output as text."""
        status = self.wait(timeout)
        return subprocess.CompletedProcess(self.arguments, status, self.read("out"), self.read("err"))


class ForkServer:
    """Starts Python code in forks of a process that was itself started with `environment`."""

    def __init__(self, environment: dict[str, str]):
        command = [sys.executable, str(Path(__file__).resolve())]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.DEVNULL}  # some modules print when they are imported
        self.process = subprocess.Popen(command, env=environment, text=True, **pipes)
        atexit.register(self.close)

    def start(self, code: str, *arguments: str, cwd: str | None = None, plain: bool = False) -> Process:
        """Runs code as `python -c CODE ARGUMENTS` would. A `plain` process has imported nothing of this library."""
        return Process(self, code, arguments, cwd, plain)

    def run(self, code: str, *arguments: str, timeout: float = 600, **options) -> subprocess.CompletedProcess:
        return self.start(code, *arguments, **options).complete(timeout)

    def close(self):
        self.process.stdin.close()
        self.process.wait()


@cache
def server(environment: tuple[tuple[str, str], ...]) -> ForkServer:
    """The server of an environment, started when it is first needed."""
    return ForkServer(dict(environment))


# --- In the server


def import_all(modules: tuple[str, ...], missing_is_fine: bool = False):
    for module in modules:
        with contextlib.suppress(ImportError) if missing_is_fine else contextlib.nullcontext():
            importlib.import_module(module)
    gc.freeze()  # a collection in a fork would copy every page that it looks at


def next_order(orders, plain: bool) -> dict | None:
    """In a fork: what to run. In a server, when nobody can give an order any more: None."""
    library = None
    for line in orders:
        order = json.loads(line)
        if plain and not order["plain"]:
            if library is None:
                read, write = os.pipe()
                if os.fork() == 0:
                    os.close(write)
                    try:
                        import_all(LIBRARY)
                        import_all(IF_INSTALLED, missing_is_fine=True)
                    except BaseException:
                        os.kill(os.getppid(), signal.SIGKILL)  # or the test would wait for ever
                        raise
                    return next_order(open(read), plain=False)
                os.close(read)
                library = open(write, "w")
            print(line, end="", file=library, flush=True)
        elif os.fork() == 0:  # a keeper, which waits for the process and notes how it ended
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            pid = os.fork()
            if pid == 0:
                return order
            note(order, "pid", pid)
            note(order, "status", os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
            os._exit(0)
    return None


def note(order: dict, name: str, value: int):
    file = Path(order["folder"], name)
    with contextlib.suppress(FileNotFoundError):  # the test is over
        file.with_suffix(".part").write_text(str(value))
        file.with_suffix(".part").rename(file)


if __name__ == "__main__":
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for keepers
    import_all(FOREIGN)
    order = next_order(sys.stdin, plain=True)
    if order is not None:
        for descriptor, file, flags in (
            (0, os.devnull, os.O_RDONLY),
            (1, f"{order['folder']}/out", os.O_WRONLY | os.O_CREAT),
            (2, f"{order['folder']}/err", os.O_WRONLY | os.O_CREAT),
        ):
            opened = os.open(file, flags)
            os.dup2(opened, descriptor)
            os.close(opened)
        sys.stdin = open(0)  # not the server's, which has read ahead
        os.chdir(order["cwd"])
        sys.argv, sys.path[0] = ["-c", *order["arguments"]], ""
        # From here on the fork ends as any interpreter does: with its exit status, a traceback, and what atexit holds.
        exec(compile(order["code"], "<string>", "exec"), {"__name__": "__main__"})
