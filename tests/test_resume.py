"""A run that is killed with SIGKILL at any moment and started again ends bitwise as one that never was."""

import json
import os
import shutil
import signal
import time

import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_run import mcd_arguments, reverse_letters, run_python, start_python, write_inputs

from trainers.run_mcd import main


RUN = "import sys; from trainers.run_mcd import main; main(sys.argv[1:])"

# Each of these makes the process kill itself, for real, at one exact moment of the run.
KILL = "import os, signal\ndef kill(): os.kill(os.getpid(), signal.SIGKILL)\n"
MOMENTS = {
    "inside a step": """
from trainers.mcd_trainer import MCDTrainer
step = MCDTrainer.training_step
def training_step(self, *a, **k):
    loss = step(self, *a, **k)
    return kill() if self.state.global_step == 5 else loss
MCDTrainer.training_step = training_step
""",
    "at a round's edge, teacher already replaced": """
from trainers.teacher import TeacherCallback
end = TeacherCallback.on_step_end
def on_step_end(self, args, state, control, **k):
    end(self, args, state, control, **k)
    if state.global_step == 8: kill()
TeacherCallback.on_step_end = on_step_end
""",
    "during a save, weights written and optimizer not": """
from trainers.mcd_trainer import MCDTrainer
save = MCDTrainer._save_optimizer_and_scheduler
def _save(self, folder):
    return kill() if self.state.global_step == 6 else save(self, folder)
MCDTrainer._save_optimizer_and_scheduler = _save
""",
    "during a save, half of the last file written": """
from transformers.trainer_callback import TrainerState
save = TrainerState.save_to_json
def save_to_json(self, path):
    save(self, path)
    if self.global_step == 8:
        os.truncate(path, os.path.getsize(path) // 2)
        kill()
TrainerState.save_to_json = save_to_json
""",
    "while a checkpoint is copied from its staging folder": """
import shutil
copy = shutil.copyfile
def copyfile(source, target, **k):
    return kill() if "/run/checkpoint-6/ema" in str(target) else copy(source, target, **k)
shutil.copyfile = copyfile
""",
    "during a save, everything written but the manifest": """
import trainers.exact_resume as resume
write = resume.write_manifest
def write_manifest(folder, **facts):
    return kill() if folder.name == "checkpoint-6" else write(folder, **facts)
resume.write_manifest = write_manifest
""",
}
ONE_KEPT = (
    "during a save, everything written but the manifest"  # with save_total_limit 1: the one before must be there
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


@pytest.fixture(scope="module")
def whole_run(inputs, tmp_path_factory):
    output = tmp_path_factory.mktemp("whole") / "run"
    result = run_python(RUN, *mcd_arguments(inputs, output, report_to="tensorboard"))
    assert result.returncode == 0, result.stderr
    return output


@pytest.fixture(scope="module")
def uninterrupted(whole_run):
    return outcome(whole_run)


def outcome(output):
    """Final student, teacher, EMA and optimizer state, and every logged loss."""
    last = output / "checkpoint-12"
    weights = {name: load_file(last / name / "model.safetensors") for name in (".", "teacher", "ema")}
    history = json.loads((last / "trainer_state.json").read_text())["log_history"]
    measured = ("loss", "divergence", "reveal", "grad_norm", "delta", "tau", "round", "masked_fraction_t")
    return weights, [{key: entry[key] for key in measured} for entry in history if "loss" in entry]


def assert_same(one, other):
    for name, state in one[0].items():
        assert state.keys() == other[0][name].keys()
        for key in state:
            assert torch.equal(state[key], other[0][name][key]), (name, key)
    assert one[1] == other[1] and len(one[1]) == 12


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_and_started_again(moment, inputs, uninterrupted, tmp_path):
    settings = {"save_total_limit": 1} if moment == ONE_KEPT else {}
    settings |= {"checkpoint_staging": tmp_path} if "staging" in moment else {}
    arguments = mcd_arguments(inputs, tmp_path / "run", **settings)
    killed = run_python(KILL + MOMENTS[moment] + RUN, *arguments)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    again = run_python(RUN, *arguments)
    assert again.returncode == 0, again.stderr
    assert "resuming from" in again.stderr
    assert_same(outcome(tmp_path / "run"), uninterrupted)


def test_the_run_moves_the_weights_and_has_its_rounds(inputs, uninterrupted):
    weights, history = uninterrupted
    assert [entry["round"] for entry in history] == [0] * 4 + [1] * 4 + [2] * 4
    assert [entry["delta"] for entry in history] == [0.125] * 4 + [0.25] * 4 + [0.5] * 4
    assert [entry["tau"] for entry in history] == [0.96] * 4 + [0.93] * 4 + [0.90] * 4
    start = load_file(inputs / "teacher" / "model.safetensors")
    assert all(not torch.equal(start[key], weights["."][key]) for key in start)
    # The third round has ended: the teacher is the student again, and the EMA lags behind both.
    assert all(torch.equal(weights["."][key], weights["teacher"][key]) for key in weights["."])
    assert not torch.equal(weights["."]["lm_head.weight"], weights["ema"]["lm_head.weight"])


def test_everything_that_the_method_varies_is_logged(whole_run):
    """Checked in the event file of TensorBoard."""
    events = EventAccumulator(str(next(whole_run.glob("runs/*")))).Reload()
    names = (
        "loss",
        "divergence",
        "reveal",
        "delta",
        "tau",
        "round",
        "masked_fraction_t",
        "masked_fraction_s",
        "grad_norm",
    )
    for name in names:
        assert [event.step for event in events.Scalars(f"train/{name}")] == list(range(1, 13)), name
    assert [event.value for event in events.Scalars("train/delta")] == [0.125] * 4 + [0.25] * 4 + [0.5] * 4


def test_a_finished_run_started_again_trains_no_more(inputs, whole_run):
    before = outcome(whole_run)
    result = run_python(RUN, *mcd_arguments(inputs, whole_run))
    assert result.returncode == 0, result.stderr
    assert_same(outcome(whole_run), before)
    assert not (whole_run / "checkpoint-13").exists()


def test_truncated_checkpoint_is_refused_by_name_and_passed_over(inputs, tmp_path):
    arguments = mcd_arguments(inputs, tmp_path / "run", num_rounds=1)
    result = run_python(RUN, *arguments)
    assert result.returncode == 0, result.stderr
    weights = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    result = run_python(RUN, *arguments, "--resume_from_checkpoint", str(weights.parent))
    assert result.returncode == 1
    assert (
        "cannot resume from" in result.stderr and "model.safetensors has 1000 bytes and should have" in result.stderr
    )
    result = run_python(RUN, *arguments)
    assert result.returncode == 0 and "resuming from" in result.stderr and "checkpoint-2" in result.stderr


def test_a_folder_in_use_is_refused_by_name(inputs, whole_run, capsys):
    """The same command is refused while its run is alive (this one waits in its first step), and works after it was
    killed.
    """
    arguments = mcd_arguments(inputs, whole_run.parent / "waiting", num_rounds=1)
    wait = "import time\nfrom trainers.mcd_trainer import MCDTrainer\n"
    wait += "MCDTrainer.training_step = lambda *a: (print('waits', flush=True), time.sleep(300))\n"
    first = start_python(wait + RUN, *arguments)
    try:
        while "waits" not in first.read("out"):
            assert first.poll() is None, first.read("err")
            time.sleep(0.02)
        before = sorted(path.name for path in (whole_run.parent / "waiting").rglob("*"))
        with pytest.raises(SystemExit) as stop:
            main(arguments)
        assert f"is in use by process {first.pid} on host {os.uname().nodename} (training since" in stop.value.code
        assert stop.value.code.endswith(f"wait for it, or stop it with `kill {first.pid}`")
        assert sorted(path.name for path in (whole_run.parent / "waiting").rglob("*")) == before
    finally:
        first.kill()
        first.wait()
    main(arguments)
    assert (whole_run.parent / "waiting" / "model.safetensors").exists()


def test_another_text_or_tokenizer_is_refused(inputs, tmp_path):
    """The same command, but the files that it names hold something else."""
    for name in ("text.txt", "tokenizer", "teacher"):
        (shutil.copytree if (inputs / name).is_dir() else shutil.copy)(inputs / name, tmp_path / name)
    arguments = mcd_arguments(tmp_path, tmp_path / "run", num_rounds=1)
    main(arguments)
    text = (tmp_path / "text.txt").read_text()
    (tmp_path / "text.txt").write_text(text.replace("walking", "running"))
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert "holds another run: its train text was another one; choose another output_dir" in stop.value.code
    (tmp_path / "text.txt").write_text(text)
    main(arguments)
    for folder in ("tokenizer", "teacher"):
        reverse_letters(tmp_path / folder)
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert "holds another run: its tokenizer was another one; choose another output_dir" in stop.value.code


def test_the_precision_of_the_launch_is_part_of_the_run(inputs, whole_run, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    with pytest.raises(SystemExit) as stop:
        main(mcd_arguments(inputs, whole_run))
    assert "holds another run: bf16 was False there and is True here" in stop.value.code


def test_a_finished_run_that_never_completed_a_checkpoint(inputs, tmp_path, caplog):
    """With nothing complete to resume from, the run begins again and keeps what was there under another name."""
    arguments = mcd_arguments(inputs, tmp_path / "run", num_rounds=1)
    main(arguments)
    for folder in (tmp_path / "run").glob("checkpoint-*"):
        (folder / "manifest.json").unlink()
    main(arguments)
    kept = tmp_path / "run" / "incomplete-checkpoint-4" / "model.safetensors"
    again = tmp_path / "run" / "checkpoint-4" / "model.safetensors"
    assert kept.read_bytes() == again.read_bytes()


def test_a_folder_with_another_run_is_refused(inputs, tmp_path):
    result = run_python(RUN, *mcd_arguments(inputs, tmp_path / "run", num_rounds=1))
    assert result.returncode == 0, result.stderr
    result = run_python(RUN, *mcd_arguments(inputs, tmp_path / "run", num_rounds=1, learning_rate=2e-2))
    assert result.returncode == 1
    line = result.stderr.strip().splitlines()[-1]
    assert line.startswith("error: output_dir") and "learning_rate was 0.01 there and is 0.02 here" in line
