"""Signals, killed processes, restarts, and other numbers of processes: nothing is lost, and one line says what happened."""

import json
import shutil
import signal
import socket
import time

import pytest
from safetensors.torch import load_file
from tiny_run import mcd_arguments, mdlm_arguments, run_python, start_python, write_inputs


pytestmark = pytest.mark.slow
RUN = "from trainers.{0} import main; main(sys.argv[1:])"
HEAD = "import json, os, signal, sys\nos.environ.update(json.loads(sys.argv.pop(1)))\n"
# Before a step: the process of a rank sends itself a signal.
SIGNAL = """
from trainers.exact_resume import ExactResumeTrainer
step = ExactResumeTrainer.training_step
def training_step(self, *a, **k):
    if self.state.global_step == {step} and self.args.process_index == {rank}:
        os.kill(os.getpid(), signal.{name})
    return step(self, *a, **k)
ExactResumeTrainer.training_step = training_step
"""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def start(arguments: list[str], processes: int = 1, before: str = "", entry: str = "run_mcd"):
    """The processes of a run, as torchrun would start them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    started = []
    for rank in range(processes):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        launch = {name: str(value) for name, value in names.items()} | {
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": port,
        }
        code = HEAD + before + RUN.format(entry)
        started.append(start_python(code, json.dumps(launch if processes > 1 else {}), *arguments))
    return started


def finish(processes, timeout: float = 200):
    return [process.complete(timeout) for process in processes]


def complete(*arguments, **options):
    for result in finish(start(*arguments, **options)):
        assert result.returncode == 0, result.stderr


def losses(output, step: int = 12) -> list[float]:
    history = json.loads((output / f"checkpoint-{step}" / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def assert_same_end(one, other):
    assert losses(one) == losses(other) and len(losses(one)) == 12
    ours, theirs = (load_file(run / "checkpoint-12" / "model.safetensors") for run in (one, other))
    assert all(ours[key].equal(theirs[key]) for key in theirs)


@pytest.fixture(scope="module")
def whole(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    complete(mcd_arguments(inputs, output))
    return output


def test_sigterm_saves_a_checkpoint_and_says_so(inputs, whole, tmp_path):
    arguments = mcd_arguments(inputs, tmp_path / "run")
    (stopped,) = finish(start(arguments, before=SIGNAL.format(step=4, rank=0, name="SIGTERM")))
    assert stopped.returncode == 143
    line = stopped.stderr.strip().splitlines()[-1]
    assert line.startswith("stopped by SIGTERM after step 5 of 12; start the same command again: it goes on from")
    assert line.endswith("checkpoint-5") and not (tmp_path / "run" / ".lock").exists()
    complete(arguments)
    assert_same_end(tmp_path / "run", whole)


def test_two_processes_stop_together_and_one_goes_on(inputs, whole, tmp_path):
    """Only one of them gets the signal. The run goes on with one process, and another division of the batch."""
    run = tmp_path / "run"
    halves = mcd_arguments(inputs, run, per_device_train_batch_size=4)
    both = finish(start(halves, 2, before=SIGNAL.format(step=4, rank=1, name="SIGTERM")))
    assert [result.returncode for result in both] == [143, 143], [result.stderr for result in both]
    said = [line for result in both for line in result.stderr.splitlines() if "stopped by SIGTERM" in line]
    assert len(said) == 1 and (run / "checkpoint-6" / "manifest.json").exists() and not (run / "checkpoint-8").exists()
    complete(mcd_arguments(inputs, run, per_device_train_batch_size=2, gradient_accumulation_steps=4))
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)


def test_a_killed_process_ends_the_others_soon(inputs, tmp_path):
    """Each process reads its own share of a stream; started again, the run ends bitwise as one that was never killed."""
    text = (inputs / "text.txt").read_text()
    for i in range(2):
        (inputs / "text").mkdir(exist_ok=True)
        (inputs / "text" / f"{i}.txt").write_text(text[i::2])
    more = {
        "streaming": True,
        "split_stream": True,
        "shuffle_buffer": 6,
        "per_device_train_batch_size": 4,
        "max_steps": 12,
    }
    more |= {
        "disable_tqdm": True,
        "logging_steps": 1,
        "save_steps": 2,
        "train_text": inputs / "text",
        "save_total_limit": 9,
    }
    more = [word for key, value in more.items() for word in (f"--{key}", str(value))]
    arguments = {name: mdlm_arguments(inputs, tmp_path / name) + more for name in ("whole", "run")}
    complete(arguments["whole"], 2, entry="run_mdlm")
    begin = time.monotonic()
    kill = SIGNAL.format(step=5, rank=1, name="SIGKILL")
    survivor, killed = finish(start(arguments["run"], 2, before=kill, entry="run_mdlm"))
    assert killed.returncode == -signal.SIGKILL and survivor.returncode == 1 and time.monotonic() - begin < 60
    line = survivor.stderr.strip().splitlines()[-1]
    assert line.startswith("error: another process of the launch has ended") and "checkpoint-4" in line
    complete(arguments["run"], 2, entry="run_mdlm")
    assert_same_end(tmp_path / "run", tmp_path / "whole")
    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    (alone,) = finish(start([*arguments["run"], "--gradient_accumulation_steps=2"], entry="run_mdlm"))
    assert alone.returncode == 1 and "each of 2 processes read its own share" in alone.stderr


def test_torchrun_restarts_a_killed_run_where_it_was(inputs, whole, tmp_path):
    script, once = tmp_path / "once.py", tmp_path / "once"
    kill = SIGNAL.format(step=5, rank=0, name="SIGKILL").replace(
        "if self", f"if not os.path.exists({str(once)!r}) and self"
    )
    kill = kill.replace("        os.kill", f"        open({str(once)!r}, 'w').close()\n        os.kill")
    script.write_text("import os, signal, sys\n" + kill + RUN.format("run_mcd"))
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "1", "--max_restarts", "1")
    result = run_python(str(script), *mcd_arguments(inputs, tmp_path / "run"), launcher=torchrun)
    assert result.returncode == 0 and once.exists() and "resuming from" in result.stderr, result.stderr
    assert_same_end(tmp_path / "run", whole)
