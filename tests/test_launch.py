"""One process, two processes under DDP, ZeRO-2 and ZeRO-3 on a CPU: the same losses and the same final networks."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import ROOT, mcd_arguments, run_python, save_judge, write_inputs
from toy_backbones import MASK, make_network

from evaluation import load_report
from modeling_mcd import as_masked_diffusion
from modeling_mcd.files import LOCK, lock_folder
from trainers.teacher import saved_weights


pytestmark = pytest.mark.slow
RUN = "import sys; from trainers.run_mcd import main; main(sys.argv[1:])"

needs_compiler = pytest.mark.skipif(
    shutil.which("g++") is None or shutil.which("ninja") is None,
    reason="DeepSpeed builds its gloo extension with g++ and ninja",
)
LAUNCHES = {
    "ddp": ("ddp_cpu.yaml", {}),
    "ddp, accumulating": ("ddp_cpu.yaml", {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}),
    "zero2": ("zero2_cpu.yaml", {}),
    "zero3": ("zero3_cpu.yaml", {}),
    "ddp, compiled": ("ddp_cpu.yaml", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
    "zero2, compiled": ("zero2_cpu.yaml", {"torch_compile": True, "torch_compile_backend": "aot_eager"}),
}


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def launch(inputs, output, config, **changes):
    """A run under `accelerate launch` with one of our configurations, or in one process when `config` is None."""
    changes = {"save_steps": 12, **({"per_device_train_batch_size": 4} if config else {}), **changes}
    arguments = mcd_arguments(inputs, output, **changes)
    if config is None:
        return run_python(RUN, *arguments)
    launcher = ["--config_file", str(ROOT / "recipes/accelerate" / config), str(ROOT / "trainers/run_mcd.py")]
    return run_python("accelerate.commands.launch", *launcher, *arguments, launcher=("-m",))


@pytest.fixture(scope="module")
def reference(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("reference") / "run"
    result = launch(inputs, output, None)
    assert result.returncode == 0, result.stderr
    return output


def losses(output, names=("loss", "divergence", "reveal")):
    history = json.loads((output / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
    return [entry[key] for entry in history if "loss" in entry for key in names]


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=needs_compiler if "zero" in name else ()) for name in LAUNCHES],
)
def test_same_losses_and_same_networks(name, inputs, reference, tmp_path):
    config, changes = LAUNCHES[name]
    result = launch(inputs, tmp_path / "run", config, **changes)
    assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "run") == pytest.approx(losses(reference), abs=1e-5)
    for network in ("teacher", "ema"):
        ours, theirs = (saved_weights(run / "checkpoint-12" / network) for run in (tmp_path / "run", reference))
        assert ours.keys() == theirs.keys()
        assert max((ours[key] - theirs[key]).abs().max().item() for key in ours) < 1e-4
    final, expected = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", reference))
    assert max((final[key] - expected[key]).abs().max().item() for key in expected) < 1e-4


@pytest.mark.parametrize("config", ["ddp_cpu.yaml", pytest.param("zero3_cpu.yaml", marks=needs_compiler)])
def test_a_student_that_is_its_own_teacher(config, inputs, tmp_path):
    """MPDC runs the trained network twice in a step: its losses are those of one process all the same."""
    for folder, launcher in (("one", None), ("two", config)):
        result = launch(inputs, tmp_path / folder, launcher, trainer="mpdc")
        assert result.returncode == 0, result.stderr
    names = ("loss", "divergence", "nelbo")
    assert losses(tmp_path / "two", names) == pytest.approx(losses(tmp_path / "one", names), abs=1e-5)


CHAIN = {"trainer": "coupling", "delta": None, "states": 4}


@pytest.fixture(scope="module")
def chain_alone(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("chain") / "run"
    result = launch(inputs, output, None, **CHAIN)
    assert result.returncode == 0, result.stderr
    return output


@pytest.mark.parametrize("config", ["ddp_cpu.yaml", pytest.param("zero2_cpu.yaml", marks=needs_compiler)])
def test_a_chain_over_a_frozen_head(config, inputs, chain_alone, tmp_path):
    """Its parameters leave the network's forward as views, and all others are frozen. A new chain's first gradients nearly
    vanish, and Adam magnifies the order in which they were summed: hence the tolerance.
    """
    result = launch(inputs, tmp_path / "run", config, **CHAIN)
    assert result.returncode == 0, result.stderr
    names = ("loss", "factorised")
    assert losses(tmp_path / "run", names) == pytest.approx(losses(chain_alone, names), abs=5e-5)
    ours, theirs = (load_file(folder / "model.safetensors") for folder in (tmp_path / "run", chain_alone))
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs if not key.startswith("coupling."))
    assert ours["coupling.transition"].abs().max() > 0.01


@pytest.fixture(scope="module")
def judged_alone(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("judged") / "run"
    judge = save_judge(output.parent / "judge")
    result = launch(inputs, output, None, judge=judge, **judged(inputs))
    assert result.returncode == 0, result.stderr
    return output, judge


def judged(inputs) -> dict:
    settings = {"num_rounds": 2, "steps_per_round": 2, "save_steps": 2, "validation_text": inputs / "text.txt"}
    return settings | {"evaluation_steps": 2, "evaluation_samples": 5, "evaluation_batch_size": 2}


@pytest.mark.parametrize("config", ["ddp_cpu.yaml", pytest.param("zero3_cpu.yaml", marks=needs_compiler)])
def test_a_judged_launch_has_the_figures_of_one_process(config, inputs, judged_alone, tmp_path):
    """The processes share the samples and the held-out text, and one of them writes the report."""
    alone, judge = judged_alone
    result = launch(inputs, tmp_path / "run", config, judge=judge, **judged(inputs))
    assert result.returncode == 0, result.stderr
    expected, rows = ({row["model"]: row for row in load_report(run)["results"]} for run in (alone, tmp_path / "run"))
    assert list(rows) == list(expected) == ["held-out text", "teacher", "round-1", "round-2"]
    for name, row in rows.items():
        for figure in ("gen_ppl", "entropy", "nfe", "samples"):
            value = expected[name][figure]
            assert row[figure] == (value if value is None else pytest.approx(value, rel=1e-4)), (name, figure)
    assert (tmp_path / "run" / "eval.md").read_text().strip() in result.stdout


def test_what_is_read_after_a_mistake_under_a_launcher(inputs, tmp_path):
    """Our line comes first, from each process. The launcher's own traceback follows, unless it starts one process with
    `--quiet`.
    """
    script, wrong = str(ROOT / "trainers" / "run_mcd.py"), mcd_arguments(inputs, tmp_path / "run", teacher="/nowhere")
    quiet = run_python("accelerate.commands.launch", "--quiet", script, *wrong, launcher=("-m",))
    *_, line = quiet.stderr.strip().splitlines()
    assert quiet.returncode == 1 and line.startswith("error: model '/nowhere' ") and "Traceback" not in quiet.stderr
    result = launch(inputs, tmp_path / "run", "ddp_cpu.yaml", teacher="/nowhere")
    assert result.returncode == 1
    assert {text for text in result.stderr.splitlines() if text.startswith("error: ")} == {line}
    assert "Traceback" not in result.stderr.split(line)[0]


@pytest.mark.parametrize("config", ["ddp_cpu.yaml", pytest.param("zero3_cpu.yaml", marks=needs_compiler)])
def test_a_wrapped_network_with_a_tied_head(config, inputs, tmp_path):
    """Its head is its embedding, which ZeRO-3 has to keep complete from the first layer's forward to the loss."""
    as_masked_diffusion(make_network("qwen3", dtype=torch.float32), MASK).save_pretrained(tmp_path / "teacher")
    for folder, launcher in (("one", None), ("two", config)):
        changes = {"teacher": tmp_path / "teacher", "num_rounds": 1, "steps_per_round": 12, "learning_rate": 1e-3}
        result = launch(inputs, tmp_path / folder, launcher, **changes)
        assert result.returncode == 0, result.stderr
    assert losses(tmp_path / "two") == pytest.approx(losses(tmp_path / "one"), abs=1e-5)


@pytest.mark.parametrize("config", ["ddp_cpu.yaml", pytest.param("zero3_cpu.yaml", marks=needs_compiler)])
def test_stopped_and_resumed_is_the_same_run(config, inputs, tmp_path):
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    result = launch(inputs, whole, config, save_steps=6)
    assert result.returncode == 0, result.stderr
    shutil.copytree(whole, halves)
    shutil.rmtree(halves / "checkpoint-12")
    result = launch(inputs, halves, config, save_steps=6)
    assert result.returncode == 0 and "resuming from" in result.stderr, result.stderr
    assert losses(whole) == losses(halves)
    for network in ("teacher", "ema"):
        ours, theirs = (saved_weights(run / "checkpoint-12" / network) for run in (halves, whole))
        assert all(ours[key].equal(theirs[key]) for key in theirs)


def test_unsynchronised_ranks_are_refused(inputs, tmp_path):
    """torchrun with an explicit gloo backend and no CPU flag is the launch that used to train two diverging ranks."""
    script = tmp_path / "unsynchronised.py"
    script.write_text(
        "import sys, trainers.resume_arguments as d; d.pick_cpu_backend = lambda arguments: None\n"
        "from trainers.run_mcd import main; main(sys.argv[1:])"
    )
    arguments = mcd_arguments(inputs, tmp_path / "run", ddp_backend="gloo", teacher="/nowhere")
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2")
    result = run_python(str(script), *arguments, launcher=torchrun)
    assert result.returncode != 0
    assert "error: 2 processes were launched, but accelerate would not synchronise their gradients" in result.stderr
    assert "Traceback" not in result.stderr.split("torch/distributed/elastic")[0]
    assert not (tmp_path / "run").exists()


def test_the_orphan_of_a_killed_launcher_is_found(inputs, tmp_path):
    """`kill -9` of `accelerate launch` leaves its child training: the same command names it, and works when it has ended."""
    wait = tmp_path / "slow.py"
    wait.write_text(
        "import sys, time\nfrom trainers import run_mcd\nfrom trainers.mcd_trainer import MCDTrainer\n"
        "step = MCDTrainer.training_step\n"
        "MCDTrainer.training_step = lambda *a: (time.sleep(0 if 'fast' in sys.argv else 300), step(*a))[1]\n"
        "run_mcd.main([word for word in sys.argv[1:] if word != 'fast'])\n"
    )
    arguments = [str(wait), *mcd_arguments(inputs, tmp_path / "run", num_rounds=1)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    launcher = subprocess.Popen([sys.executable, "-m", "accelerate.commands.launch", *arguments], env=environment)
    lock = tmp_path / "run" / LOCK
    while not lock.exists() or not lock.read_text():
        assert launcher.poll() is None
        time.sleep(0.2)
    orphan = json.loads(lock.read_text())["pid"]
    launcher.kill()
    launcher.wait()
    try:
        result = run_python("accelerate.commands.launch", *arguments, "fast", launcher=("-m",))
        line = next(line for line in result.stderr.splitlines() if line.startswith("error: "))
        assert f"is in use by process {orphan} on host" in line and f"`kill {orphan}`" in line
        assert f"left behind by its launcher, process {launcher.pid}, which is gone" in line
    finally:
        os.kill(orphan, signal.SIGKILL)
    result = run_python("accelerate.commands.launch", *arguments, "fast", launcher=("-m",))
    assert result.returncode == 0, result.stderr
    assert (tmp_path / "run" / "model.safetensors").exists()


def test_of_two_ranks_one_says_that_a_folder_is_in_use(inputs, tmp_path):
    with lock_folder(tmp_path / "run", "training"):
        result = launch(inputs, tmp_path / "run", "ddp_cpu.yaml")
    assert result.returncode != 0
    assert len([line for line in result.stderr.splitlines() if "is in use by process" in line]) == 1
    assert not list((tmp_path / "run").glob("*"))


@needs_compiler
def test_a_lock_of_a_killed_compile_is_named(inputs, tmp_path, monkeypatch):
    """DeepSpeed would wait for such a lock for ever."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "cache"))
    lock = tmp_path / "cache" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    result = launch(inputs, tmp_path / "run", "zero2_cpu.yaml")
    assert f"error: {lock} was left by a compile that was killed" in result.stderr
    assert f"rm -r {lock.parent}" in result.stderr and not (tmp_path / "run").exists()
