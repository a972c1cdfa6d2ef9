"""Signals, killed processes, restarts, and other launches: nothing is lost, and one line says what happened."""

import shutil
import signal
import time

import pytest
from launches import RUN, SIGNAL, complete, finish, fsdp, losses, start, zero
from safetensors.torch import load_file
from tiny_run import mcd_arguments, mdlm_arguments, run_python, write_inputs


pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def assert_same_end(one, other):
    assert losses(one) == losses(other) and len(losses(one)) == 12
    ours, theirs = (load_file(run / "checkpoint-12" / "model.safetensors") for run in (one, other))
    assert all(ours[key].equal(theirs[key]) for key in theirs)


def largest_difference(one, other, file: str = "model.safetensors") -> float:
    """Of the finished networks."""
    ours, theirs = load_file(one / file), load_file(other / file)
    assert ours.keys() == theirs.keys()
    return max((ours[key] - theirs[key]).abs().max().item() for key in theirs)


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


def test_sigterm_before_the_first_step_ends_the_run_at_once(inputs, tmp_path):
    """Networks and optimizer are being made: a process may wait there for one that has ended, in code that runs no handler."""
    before = """
from trainers.exact_resume import ExactResumeTrainer
create = ExactResumeTrainer.create_optimizer
def create_optimizer(self, *a, **k):
    os.kill(os.getpid(), signal.SIGTERM)
    return create(self, *a, **k)
ExactResumeTrainer.create_optimizer = create_optimizer
"""
    (stopped,) = finish(start(mcd_arguments(inputs, tmp_path / "run"), before=before))
    assert stopped.returncode == -signal.SIGTERM and not list((tmp_path / "run").glob("checkpoint-*"))


def test_a_process_killed_before_training_leaves_one_line(inputs, tmp_path):
    """The first process keeps the store of the launch, so that the other one hears of its end while it waits for it."""
    before = """
from trainers import run_mcd
load = run_mcd.load_data
def load_data(*a, **k):
    if os.environ.get("RANK") == "0":
        os.kill(os.getpid(), signal.SIGKILL)
    return load(*a, **k)
run_mcd.load_data = load_data
"""
    arguments = mcd_arguments(inputs, tmp_path / "run", per_device_train_batch_size=4)
    killed, survivor = finish(start(arguments, 2, before=before))
    assert killed.returncode == -signal.SIGKILL and survivor.returncode == 1
    (line,) = (line for line in survivor.stderr.splitlines() if line.startswith("error: "))
    assert line.startswith("error: another process of the launch has ended") and "Traceback" not in survivor.stderr


def test_two_processes_stop_together_and_one_and_four_go_on(inputs, whole, tmp_path):
    """Only one of the two gets the signal. Each launch divides the batch in another way."""
    run = tmp_path / "run"
    halves = mcd_arguments(inputs, run, per_device_train_batch_size=4)
    both = finish(start(halves, 2, before=SIGNAL.format(step=4, rank=1, name="SIGTERM")))
    assert [result.returncode for result in both] == [143, 143], [result.stderr for result in both]
    said = [line for result in both for line in result.stderr.splitlines() if "stopped by SIGTERM" in line]
    assert len(said) == 1 and (run / "checkpoint-6" / "manifest.json").exists() and not (run / "checkpoint-8").exists()
    one = mcd_arguments(inputs, run, per_device_train_batch_size=2, gradient_accumulation_steps=4)
    (alone,) = finish(start(one, before=SIGNAL.format(step=8, rank=0, name="SIGTERM")))
    assert alone.returncode == 143 and (run / "checkpoint-9" / "manifest.json").exists(), alone.stderr
    complete(mcd_arguments(inputs, run, per_device_train_batch_size=1, gradient_accumulation_steps=2), 4)
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)
    assert largest_difference(run, whole) < 1e-4


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


FULL, SHARDED = fsdp("FULL_STATE_DICT"), fsdp("SHARDED_STATE_DICT")


@pytest.mark.parametrize("lora", [{}, {"lora_r": 4}], ids=["weights", "adapter"])
def test_every_launch_goes_on_from_every_other(lora, inputs, tmp_path):
    """FSDP2, with its other files, with DDP, with FSDP2 again, in one process: each trains two steps further."""
    run, whole = tmp_path / "run", tmp_path / "whole"
    settings = {"per_device_train_batch_size": 4, "save_steps": 12, "save_total_limit": 9, **lora}
    halves = mcd_arguments(inputs, run, **settings)
    for step, launch in ((1, FULL), (3, SHARDED), (5, {}), (7, SHARDED), (9, FULL)):
        last = SIGNAL.format(step=step, rank=1, name="SIGTERM")
        both = finish(start(halves, 2, before=last, environment=launch))
        assert [result.returncode for result in both] == [143, 143], [result.stderr for result in both]
    complete(mcd_arguments(inputs, run, gradient_accumulation_steps=2, **settings))
    complete(mcd_arguments(inputs, whole, **lora))
    signs = ["optimizer.bin", "optimizer_0", "optimizer.pt", "optimizer_0", "optimizer.bin", "optimizer.pt"]
    for number, sign in zip((3, 5, 7, 9, 11, 12), signs, strict=True):
        assert (run / f"checkpoint-{number}" / sign).exists()
    assert losses(run) == pytest.approx(losses(whole), abs=1e-5)
    assert largest_difference(run, whole, "adapter_model.safetensors" if lora else "model.safetensors") < 1e-4


@pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("ninja") is None,
    reason="DeepSpeed builds its gloo extension with g++ and ninja",
)
def test_what_deepspeed_cannot_take_up_is_refused_by_name(inputs, tmp_path):
    arguments = mcd_arguments(inputs, tmp_path / "run", num_rounds=1, per_device_train_batch_size=4)
    last = SIGNAL.format(step=0, rank=0, name="SIGTERM")
    stopped = finish(start(arguments, 2, before=last, environment=zero(2)))
    assert {result.returncode for result in stopped} == {143}, [result.stderr for result in stopped]
    alone = [*arguments, "--gradient_accumulation_steps", "2"]
    quarters = [*arguments, "--per_device_train_batch_size", "2"]
    for words, processes, launch, says in (
        (
            alone,
            1,
            {},
            "written under DeepSpeed, and this launch has no FSDP: nothing else reads or writes DeepSpeed's",
        ),
        (quarters, 4, zero(2), "in 2 pieces, one for each process, and now there are 4; start as it was started"),
        (arguments, 2, zero(3), "has written it under another stage, and this launch has ZeRO-3; start as it was"),
    ):
        results = finish(start(words, processes, environment=launch))
        assert {result.returncode for result in results} == {1}
        (line,) = (line for result in results for line in result.stderr.splitlines() if line.startswith("error: "))
        assert "checkpoint-2: " in line and says in line
    complete(arguments, 2, environment=zero(2))
    assert (tmp_path / "run" / "model.safetensors").exists()
