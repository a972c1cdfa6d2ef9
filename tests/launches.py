"""Runs of the entry points in several processes, as `torchrun` and `accelerate launch` start them, but at once."""

import json
import socket
import subprocess

from fork_server import Process
from tiny_run import start_python


RUN = "from trainers.{0} import main; main(sys.argv[1:])"
HEAD = "import json, os, signal, sys, time\nos.environ.update(json.loads(sys.argv.pop(1)))\n"
# Code before a step: the process of a rank sends itself a signal.
SIGNAL = """
from trainers.exact_resume import ExactResumeTrainer
step = ExactResumeTrainer.training_step
def training_step(self, *a, **k):
    if self.state.global_step == {step} and self.args.process_index == {rank}:
        os.kill(os.getpid(), signal.{name})
    return step(self, *a, **k)
ExactResumeTrainer.training_step = training_step
"""


def fsdp(kind: str) -> dict:
    """For `start`: what `accelerate launch` sets for FSDP2, with `FULL_STATE_DICT` or `SHARDED_STATE_DICT`."""
    names = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2", "FSDP_STATE_DICT_TYPE": kind}
    return names | {"FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP"}


def zero(stage: int) -> dict:
    """For `start`: what `accelerate launch` sets for DeepSpeed's ZeRO, with the configurations that we ship."""
    names = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "auto", "ACCELERATE_GRADIENT_CLIPPING": "auto"}
    names |= {f"ACCELERATE_DEEPSPEED_OFFLOAD_{what}_DEVICE": "none" for what in ("OPTIMIZER", "PARAM")}
    names |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": str(stage)}
    return names | {"ACCELERATE_DEEPSPEED_ZERO3_INIT": "false", "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true"}


def start(
    arguments: list[str], processes: int = 1, before: str = "", entry: str = "run_mcd", environment: dict | None = None
) -> list[Process]:
    """The processes of a run.

    Args:
        before: code that each of them runs first.
        environment: `fsdp(...)` or `zero(...)`; DDP without it.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    if environment and "ACCELERATE_USE_FSDP" in environment:
        before = "from benchmarks.sharded_memory import promote\npromote()\n" + before
    started = []
    for rank in range(processes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        launch = {name: str(value) for name, value in names.items()}
        launch |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, **(environment or {})}
        code = HEAD + before + RUN.format(entry)
        started.append(start_python(code, json.dumps(launch if processes > 1 else {}), *arguments))
    return started


def finish(processes: list[Process], timeout: float = 200) -> list[subprocess.CompletedProcess]:
    return [process.complete(timeout) for process in processes]


def complete(*arguments, **options):
    """Runs to the end, without an error."""
    for result in finish(start(*arguments, **options)):
        assert result.returncode == 0, result.stderr


def losses(output, step: int = 12) -> list[float]:
    """The logged losses of a run of so many steps."""
    history = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]
