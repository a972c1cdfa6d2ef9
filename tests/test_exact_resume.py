"""What resume rests on: checkpoints that are complete and undamaged, and the hooks of `Trainer` that we use.

A test of section "Hooks" that fails after an upgrade of transformers says in its first line what no longer holds.
"""

import copy
import errno
import json
import math
import os
import shutil
import signal
import threading
import time
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import mcd_arguments, write_inputs
from torch.distributed import checkpoint
from toy_distillers import ROWS, blocks
from transformers import TrainerCallback

from modeling_mcd.command_line import line_of
from modeling_mcd.files import read_object
from trainers import run_mcd
from trainers.checkpoints import (
    MANIFEST,
    TRAINER_STATE,
    clear_later_checkpoints,
    fault_of,
    last_complete_checkpoint,
    write_manifest,
)
from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments
from trainers.resume_arguments import ExactResumeArguments
from trainers.staging import copy_checkpoint


RUN = {"ema_decay": 0.9, "save_strategy": "steps", "save_steps": 2, "save_total_limit": 9, "logging_steps": 1}
RUN |= {"learning_rate": 1e-2, "warmup_steps": 2, "disable_tqdm": True, "report_to": "none"}


def build(networks, folder, eval_dataset=None, **settings):
    """An MCD trainer of 8 steps in two rounds with teacher and EMA, always from the same weights."""
    teacher, student = copy.deepcopy(networks["absorbing"])
    settings = {**RUN, "num_rounds": 2, "steps_per_round": 4, "delta": 0.125, "seed": 11, **settings}
    arguments = MCDTrainingArguments(output_dir=str(folder), per_device_train_batch_size=ROWS, **settings)
    rows = [{"input_ids": row.tolist()} for row in blocks()] * 8
    return MCDTrainer(student, arguments, teacher=teacher, train_dataset=rows, eval_dataset=eval_dataset)


@pytest.fixture
def trainer_of(networks):
    return partial(build, networks)


@pytest.fixture(scope="module")
def whole(networks, tmp_path_factory):
    """An uninterrupted run; copy its folder before you change it."""
    trainer = build(networks, tmp_path_factory.mktemp("whole") / "run")
    trainer.train()
    return trainer


@pytest.fixture
def finished(whole, tmp_path):
    return shutil.copytree(whole.args.output_dir, tmp_path / "run")


@pytest.fixture
def lines(monkeypatch):
    """What was said as a warning."""
    said = []
    monkeypatch.setattr("trainers.checkpoints.logger.warning", said.append)
    return said


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)


def names(folder):
    return sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)


# --- Checkpoints


def test_a_flipped_byte_in_any_file_is_found(finished):
    folder = finished / "checkpoint-2"
    files = [path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST]
    assert {f"{path.relative_to(folder)}" for path in files} >= {
        *("model.safetensors", "ema/model.safetensors", "teacher/model.safetensors", "optimizer.pt", "scheduler.pt"),
        *("rng_state.pth", "config.json", "training_args.bin", TRAINER_STATE),
    }
    assert fault_of(folder) is None
    for path in files:
        content = path.read_bytes()
        flip(path)
        assert path.name in fault_of(folder), path
        path.write_bytes(content)
    assert fault_of(folder) is None
    content = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(content.replace('"learning_rate": 0.', '"learning_rate": 1.'))
    assert "manifest.json is damaged" in fault_of(folder), "the rate would have been taken for a changed one"
    (folder / MANIFEST).unlink()
    assert "manifest.json is missing: it was never written to the end" in fault_of(folder)


@pytest.mark.parametrize("file", ["ema/model.safetensors", "trainer_state.json"])
def test_a_damaged_checkpoint_is_passed_over(file, trainer_of, whole, finished, lines):
    flip(finished / "checkpoint-8" / file)
    resumed = trainer_of(finished)
    resumed.train(True)
    assert [line for line in lines if "checkpoint-8 is passed over: " in line and file in line]
    assert resumed._resumed_from == finished / "checkpoint-6" and fault_of(finished / "checkpoint-8") is None
    for one, other in ((resumed.model, whole.model), (resumed.whole_student(), whole.whole_student())):
        assert all(torch.equal(value, other.get_parameter(name)) for name, value in one.named_parameters())


def test_a_damaged_checkpoint_is_refused_by_name(trainer_of, finished):
    flip(finished / "checkpoint-6" / "config.json")
    with pytest.raises(ValueError, match="cannot resume from .*checkpoint-6: config.json is damaged"):
        trainer_of(finished).train(str(finished / "checkpoint-6"))


def test_with_nothing_to_resume_from_nothing_is_removed(finished, lines):
    before = names(finished)
    for name in before:
        flip(finished / name / "model.safetensors")
    with pytest.raises(
        ValueError, match=r"none to resume from \(checkpoint-8: model.safetensors is damaged.*checkpoint-2"
    ):
        last_complete_checkpoint(finished)
    assert names(finished) == before
    for name in before:  # never completed
        (finished / name / MANIFEST).unlink()
    assert last_complete_checkpoint(finished) is None
    clear_later_checkpoints(finished, None)
    assert names(finished) == [f"incomplete-{name}" for name in before]
    assert sum("there is nothing to resume from: it is now" in line for line in lines) == 4


def test_what_is_removed_is_said(finished, lines):
    (finished / "checkpoint-8" / MANIFEST).unlink()
    (finished / "checkpoint-final").mkdir()  # not ours
    clear_later_checkpoints(finished, last_complete_checkpoint(finished))
    assert names(finished) == ["checkpoint-2", "checkpoint-4", "checkpoint-6", "checkpoint-final"]
    assert "removing" in lines[-1] and "checkpoint-8 (manifest.json is missing" in lines[-1]


def test_a_manifest_of_sizes_alone_is_not_trusted(finished):
    (finished / "checkpoint-2" / MANIFEST).write_text('{"model.safetensors": 10}')
    assert fault_of(finished / "checkpoint-2") == (
        "manifest.json has no digests: it is of an earlier version of this library"
    )


def test_an_error_in_a_save_leaves_no_torn_checkpoint(trainer_of, tmp_path):
    trainer = trainer_of(tmp_path)

    class Broken:
        def save(self, folder):
            if folder.startswith(str(tmp_path / "checkpoint-4")):
                raise OSError("the disk is full")

    trainer.companions["broken"] = Broken()
    with pytest.raises(OSError, match="the disk is full"):
        trainer.train()
    assert names(tmp_path) == ["checkpoint-2"] and trainer.args.save_total_limit == 9


# --- Staging


@pytest.fixture
def staged(trainer_of, tmp_path):
    """Trainers whose checkpoints are copied to their folder while training goes on."""
    (tmp_path / "fast").mkdir()
    yield partial(trainer_of, tmp_path / "run", checkpoint_staging=str(tmp_path / "fast"))
    assert not list((tmp_path / "fast").iterdir())


def test_staged_checkpoints_hold_the_same_files(staged, whole, tmp_path):
    staged().train()
    theirs = Path(whole.args.output_dir)
    assert names(tmp_path / "run") == names(theirs) == [f"checkpoint-{step}" for step in (2, 4, 6, 8)]
    for name in names(theirs):
        ours = tmp_path / "run" / name
        assert fault_of(ours) is None
        for file in (theirs / name).rglob("*"):
            copy = ours / file.relative_to(theirs / name)
            if file.is_file() and file.name not in (MANIFEST, "training_args.bin"):  # the settings are others
                assert copy.read_bytes() == file.read_bytes(), copy


def test_training_goes_on_while_a_checkpoint_is_copied(staged, tmp_path, monkeypatch):
    trainer, go_on, seen = staged(), threading.Event(), []
    step = trainer.training_step
    copy_when_told = lambda *a, **k: (go_on.wait(60), copy_checkpoint(*a, **k))  # noqa: E731
    monkeypatch.setattr("trainers.exact_resume.copy_checkpoint", copy_when_told)

    def training_step(*arguments):
        if trainer.state.global_step == 3:
            seen.append((tmp_path / "run" / "checkpoint-2" / MANIFEST).exists())
            go_on.set()
        return step(*arguments)

    trainer.training_step = training_step
    trainer.train()
    assert seen == [False] and fault_of(tmp_path / "run" / "checkpoint-2") is None


def test_an_error_of_the_copy_ends_the_run(staged, tmp_path, monkeypatch):
    """The disk is full in the middle of the second checkpoint: nothing of it is left, and the first one is complete."""
    copy = shutil.copyfile

    def copyfile(source, target, **options):
        if "run/checkpoint-4/ema" in str(target):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(source), None, str(target))
        return copy(source, target, **options)

    monkeypatch.setattr(shutil, "copyfile", copyfile)
    trainer = staged()
    with pytest.raises(OSError) as error:
        trainer.train()
    assert line_of(error.value).startswith(
        f"no space left on the disk while writing {tmp_path / 'run' / 'checkpoint-4'}"
    )
    assert names(tmp_path / "run") == ["checkpoint-2"] and fault_of(tmp_path / "run" / "checkpoint-2") is None
    assert trainer.state.global_step <= 6


def test_sigterm_waits_for_the_copy(staged, tmp_path, monkeypatch):
    trainer = staged()
    step = trainer.training_step
    slowly = lambda *a, **k: (time.sleep(0.5), copy_checkpoint(*a, **k))  # noqa: E731
    monkeypatch.setattr("trainers.exact_resume.copy_checkpoint", slowly)
    kill = lambda: trainer.state.global_step == 4 and os.kill(os.getpid(), signal.SIGTERM)  # noqa: E731
    trainer.training_step = lambda *arguments: (kill(), step(*arguments))[1]
    with pytest.raises(SystemExit) as stop:
        trainer.train()
    assert stop.value.code == 143 and fault_of(tmp_path / "run" / "checkpoint-5") is None


# --- Another launch


@pytest.mark.parametrize("kind", ["optimizer.bin", "optimizer_0"])
def test_files_of_fsdp2_are_read_without_it(kind, trainer_of, whole, finished):
    """A checkpoint that is rewritten as FSDP2 writes it, by names, in one file or in parts: bitwise the same end."""
    folder, names = finished / "checkpoint-6", {id(p): name for name, p in whole.model.named_parameters()}
    names = [names[id(p)] for group in whole.optimizer.param_groups for p in group["params"]]
    state = torch.load(folder / "optimizer.pt", weights_only=True)
    groups = [{**group, "params": [names[i] for i in group["params"]]} for group in state["param_groups"]]
    state = {"state": {names[i]: values for i, values in state["state"].items()}, "param_groups": groups}
    (folder / "optimizer.pt").unlink()
    if kind == "optimizer.bin":
        torch.save(state, folder / kind)
        torch.save({}, folder / "pytorch_model_fsdp.bin")  # not read: the model is there as a model
    else:
        weights = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        for name, content in ((kind, {"optimizer": state}), ("pytorch_model_fsdp_0", {"model": weights})):
            checkpoint.save(content, storage_writer=checkpoint.FileSystemWriter(folder / name), no_dist=True)
    (folder / MANIFEST).unlink()
    write_manifest(folder, learning_rate=1e-2)
    resumed = trainer_of(finished)
    resumed.train(str(folder))
    for name, value in resumed.model.named_parameters():
        assert torch.equal(value, whole.model.get_parameter(name)), name
    losses = [[line["loss"] for line in trainer.state.log_history if "loss" in line] for trainer in (resumed, whole)]
    assert losses[0] == losses[1] and len(losses[0]) == 8


def test_a_checkpoint_of_deepspeed_is_refused(trainer_of, finished):
    folder = finished / "checkpoint-6"
    (folder / "optimizer.pt").rename(folder / "latest")
    (folder / MANIFEST).unlink()
    write_manifest(folder, learning_rate=1e-2)
    with pytest.raises(
        ValueError, match="written under DeepSpeed, and this launch has no FSDP.*start as it was started"
    ):
        trainer_of(finished).train(str(folder))


# --- Hooks


def test_hook_save_model_is_the_first_call_of_a_save(trainer_of, tmp_path):
    """The Trainer's first call of a save is `save_model(folder, _internal_call=True)`: there companions are written."""
    trainer, seen = trainer_of(tmp_path, max_steps=2), []

    class Watch:
        def save(self, folder):
            seen.append([path.name for path in (tmp_path / "checkpoint-2").iterdir()])

        def load(self, folder):
            raise AssertionError

    trainer.companions = {"watch": Watch(), **trainer.companions}
    (tmp_path / "checkpoint-2").mkdir()
    (tmp_path / "checkpoint-2" / "stale").touch()
    with pytest.raises(FileNotFoundError):  # the folder was cleared, and nothing of the Trainer's is there yet
        trainer.train()
    assert seen == []


def test_hook_on_save_comes_after_the_last_file(finished):
    """The Trainer calls `on_save` after its last file, the trainer's state: there the manifest is written."""
    folder = finished / "checkpoint-2"
    files = read_object(folder / MANIFEST)["files"]
    assert files.keys() == {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} - {MANIFEST}
    assert TRAINER_STATE in files


def test_hook_rotation_obeys_the_limit_of_the_moment(trainer_of, tmp_path):
    """The Trainer reads `args.save_total_limit` when it rotates: so an old checkpoint outlives a new one's save.

    The clock is set back before every save: the step says what is old, not a file's time.
    """
    trainer, seen = trainer_of(tmp_path, save_total_limit=1), []

    class Watch(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            for folder in tmp_path.glob("checkpoint-*"):
                os.utime(folder, (4e9 - state.global_step,) * 2)
            seen.append((names(tmp_path), [f.name for f in tmp_path.glob("checkpoint-*") if (f / MANIFEST).exists()]))

    trainer.callback_handler.callbacks.insert(0, Watch())
    trainer.train()
    assert seen[1] == (["checkpoint-2", "checkpoint-4"], ["checkpoint-2"])
    assert names(tmp_path) == ["checkpoint-8"] and trainer.args.save_total_limit == 1


def test_hook_on_train_begin_comes_after_the_optimizer_s_state(trainer_of, finished):
    """The Trainer calls `on_train_begin` when optimizer and scheduler are restored, before any forward."""
    trainer, seen = trainer_of(finished), []
    restore, step = trainer._restore, trainer.training_step

    def watch_restore(folder):
        seen.append(
            ("restore", len(trainer.optimizer.state), trainer.lr_scheduler.last_epoch, trainer.state.global_step)
        )
        restore(folder)

    def watch_step(*arguments):
        seen.append("step")
        return step(*arguments)

    trainer._restore, trainer.training_step = watch_restore, watch_step
    trainer.train(finished / "checkpoint-6")
    parameters = len(list(trainer.model.parameters()))
    assert seen[0] == ("restore", parameters, 6, 6) and seen[1:] == ["step"] * 2


def test_hook_run_epoch_is_not_entered_by_a_finished_run(trainer_of, finished):
    """`Trainer._run_epoch` runs the steps of an epoch: a finished run that is started again makes none."""
    trainer = trainer_of(finished)
    trainer.training_step = None
    assert trainer.train(True).global_step == 8


def test_hook_grad_norm_is_asked_before_the_optimizer_steps(trainer_of, tmp_path):
    """`Trainer._get_grad_norm` returns the norm before `optimizer.step`: a NaN in it stops the run and moves no weight."""
    trainer = trainer_of(tmp_path)
    trainer.model.lm_head.bias.register_hook(lambda gradient: gradient * math.nan)
    before = copy.deepcopy(trainer.model.state_dict())
    with pytest.raises(FloatingPointError, match="the gradient norm is nan at step 0"):
        trainer.train()
    assert all(torch.equal(value, before[name]) for name, value in trainer.model.state_dict().items())


def test_hook_train_sampler_gives_an_order_that_a_resumed_run_repeats(networks, tmp_path):
    """`Trainer._get_train_sampler` makes the order of the rows: by length from 7 steps an epoch, resumed in the second."""
    generator = torch.Generator().manual_seed(0)
    widths = torch.randint(8, 33, (28,), generator=generator).tolist()
    rows = [{"input_ids": blocks()[i % ROWS, :width].tolist(), "length": width} for i, width in enumerate(widths)]
    assert len(rows) == 7 * ROWS

    def run(folder, checkpoint=None):
        trainer = build(networks, folder, train_sampling_strategy="group_by_length", steps_per_round=5)
        trainer.train_dataset = rows
        seen = []
        collate = trainer.data_collator
        trainer.data_collator = lambda batch: (seen.append([row["length"] for row in batch]), collate(batch))[1]
        trainer.train(checkpoint)
        return seen, [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]

    seen, losses = run(tmp_path / "run")
    assert sorted(width for batch in seen[:7] for width in batch) == sorted(widths) and seen[:3] != seen[7:]
    assert sum(max(batch) * ROWS - sum(batch) for batch in seen[:7]) < sum(widths) / 10  # little of it is padding
    assert run(tmp_path / "again", str(tmp_path / "run" / "checkpoint-8"))[1] == losses


@pytest.mark.parametrize("save_steps", [2, 8])
def test_numbers_that_are_checked_later_still_stop_the_run(trainer_of, tmp_path, save_steps):
    """As on a GPU, where the host does not wait for a loss: the message names its step, and nothing is saved after it."""
    trainer, steps = trainer_of(tmp_path, save_steps=save_steps), []
    trainer.checks_later = True
    trainer.model.lm_head.bias.register_hook(lambda gradient: gradient * (math.nan if len(steps) == 6 else 1))
    step = trainer.training_step
    trainer.training_step = lambda *arguments: steps.append(0) or step(*arguments)
    with pytest.raises(FloatingPointError, match="the gradient norm is nan at step 5"):
        trainer.train()
    assert len(steps) == (6 if save_steps == 2 else 7), "checked before a save, else in the step that follows"
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == (
        {"checkpoint-2", "checkpoint-4"} if save_steps == 2 else set()
    )


def test_hook_on_train_end_comes_after_the_best_model_is_loaded(trainer_of, tmp_path):
    """The Trainer loads the best checkpoint's network before `on_train_end`: there companions follow."""
    settings = {"eval_strategy": "steps", "eval_steps": 2, "load_best_model_at_end": True, "greater_is_better": True}
    settings |= {"metric_for_best_model": "height", "eval_dataset": [{"input_ids": row.tolist()} for row in blocks()]}
    trainer = trainer_of(tmp_path, per_device_eval_batch_size=ROWS, **settings)
    heights = iter([1.0, 3.0, 2.0, 0.0])
    trainer.evaluate = lambda *arguments, **options: {"eval_height": next(heights, 0.0)}
    trainer.train()
    assert trainer.state.best_model_checkpoint.endswith("checkpoint-4")
    best = {
        name: load_file(tmp_path / "checkpoint-4" / name / "model.safetensors") for name in (".", "ema", "teacher")
    }
    for network, state in ((trainer.model, best["."]), (trainer.whole_student(), best["ema"])):
        assert all(torch.equal(value, state[name]) for name, value in network.named_parameters())
    last = load_file(tmp_path / "checkpoint-8" / "ema" / "model.safetensors")
    assert not torch.equal(last["lm_head.weight"], best["ema"]["lm_head.weight"])


# --- A smaller learning rate


def test_the_advice_after_a_nan_works_when_followed(tmp_path, monkeypatch):
    """The advice is followed word by word: the run goes on from its checkpoint with half the learning rate, and can
    itself be resumed.
    """
    inputs = write_inputs(tmp_path)
    loss_of = MCDTrainer.compute_loss

    def compute_loss(self, *arguments, **options):  # diverges at a learning rate of 1e-2
        loss = loss_of(self, *arguments, **options)
        return loss * math.nan if self.state.global_step == 5 and self.args.learning_rate > 6e-3 else loss

    monkeypatch.setattr(MCDTrainer, "compute_loss", compute_loss)
    command = [*mcd_arguments(inputs, tmp_path / "run", num_rounds=2), "--report_to", "none"]
    with pytest.raises(SystemExit) as stop:
        run_mcd.main(command)
    advice = stop.value.code.split("add `")[1].split("` to the same command")[0]
    assert advice == (
        f"--resume_from_checkpoint {tmp_path / 'run' / 'checkpoint-4'} --output_dir NEW_FOLDER --learning_rate 0.005"
    )
    monkeypatch.chdir(tmp_path)
    run_mcd.main([*command, *advice.split()])
    history = read_object(tmp_path / "NEW_FOLDER" / "checkpoint-8" / TRAINER_STATE)["log_history"]
    rates = {entry["step"]: entry["learning_rate"] for entry in history if "loss" in entry}
    assert rates == {1: 0.0, 2: 0.005, 3: 0.01, 4: 0.01, 5: 0.005, 6: 0.005, 7: 0.005, 8: 0.005}
    run = json.loads((tmp_path / "NEW_FOLDER" / "run.json").read_text())
    assert run["started_from"]["changed"] == {"learning_rate": [0.01, 0.005]} and run["learning_rate"] == 0.005
    # Stopped and started again with the same command, or without the checkpoint that is no longer needed.
    expected = (tmp_path / "NEW_FOLDER" / "model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "NEW_FOLDER" / "checkpoint-8")
    (tmp_path / "NEW_FOLDER" / "model.safetensors").unlink()
    run_mcd.main([*command, *advice.split()])
    assert (tmp_path / "NEW_FOLDER" / "model.safetensors").read_bytes() == expected
    shutil.rmtree(tmp_path / "run")
    run_mcd.main([*command, "--output_dir", "NEW_FOLDER", "--learning_rate", "0.005"])


# --- Settings


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"save_only_model": True}, "save_only_model is true, but such checkpoints have no optimizer"),
        ({"hub_strategy": "every_save"}, "hub_strategy is 'every_save', but a run is pushed once"),
        ({"learning_rate": None}, "learning_rate is null, but must be a positive number"),
        ({"fsdp": True}, r"FSDP needs GPUs \(on a CPU it would silently be DDP\)"),
        ({"fsdp": True, "fsdp_config": {"version": 1}}, "fsdp_version is 1, but only 2 is supported"),
        (
            {"fsdp": True, "fsdp_config": {"fsdp_cpu_ram_efficient_loading": True}},
            "fsdp_cpu_ram_efficient_loading is true, but the first teacher is needed",
        ),
        ({"fsdp": True, "save_on_each_node": True}, "save_on_each_node is true, but every process writes a part"),
        (
            {"checkpoint_staging": "/nowhere"},
            "checkpoint_staging is '/nowhere', but no folder there can be written to",
        ),
        ({"checkpoint_staging": "/tmp", "metric_for_best_model": "loss"}, "which cannot keep the best checkpoint"),
        ({"save_total_limit": 0}, "save_total_limit must be at least 1, not 0"),
        ({"save_total_limit": 1, "metric_for_best_model": "loss"}, "save_total_limit is 1, but with load_best"),
        ({"save_steps": 3, "logging_steps": 2}, r"save_steps \(3\) must be a multiple of logging_steps \(2\): a run"),
        (
            {"save_steps": 0.3, "logging_steps": 0.1, "max_steps": 25},
            r"save_steps \(0.3\) must be a multiple of logging_steps \(0.1\), which is every 8 and every 3 of 25 steps",
        ),
    ],
)
def test_settings_that_would_break_resume_are_refused(settings, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        ExactResumeArguments(output_dir=str(tmp_path), **settings)


def test_fsdp_from_the_launcher_that_would_not_shard(trainer_of, tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(ValueError, match="fsdp_version is 1, but only 2"):  # accelerate's default
        ExactResumeArguments(output_dir=str(tmp_path))
    monkeypatch.setenv("FSDP_VERSION", "2")
    with pytest.raises(ValueError, match="FSDP needs GPUs"):
        ExactResumeArguments(output_dir=str(tmp_path))
    # Whatever the settings say, the trainer looks at what accelerate has made of them.
    monkeypatch.setattr("trainers.sharded_trainer.refuse_without_accelerator", lambda arguments: None)
    with pytest.raises(ValueError, match="FSDP is asked for, but accelerate would run NO: start several processes"):
        trainer_of(tmp_path)


def test_ratios_are_of_the_steps(trainer_of, tmp_path):
    trainer_of(tmp_path, save_steps=0.5, logging_steps=0.25, max_steps=8).train()
    assert names(tmp_path) == ["checkpoint-4", "checkpoint-8"]
    ExactResumeArguments(output_dir=str(tmp_path), save_steps=0.3, logging_steps=0.1, max_steps=100)
