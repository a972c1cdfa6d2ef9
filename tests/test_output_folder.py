"""The output folder of a run, the judge's run in it, and the recipe of its card."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import BLOCK, judge_arguments, mcd_arguments, mdlm_arguments, write_inputs

from trainers import run_judge, run_mcd, run_mdlm
from trainers.resume_arguments import ExactResumeArguments
from trainers.runs.output_folder import check_output_dir, claim_output_dir, find_checkpoint, portable_path
from trainers.runs.recipe import RECIPE_FOLDER


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    return write_inputs(tmp_path_factory.mktemp("inputs"))


def train_judge(inputs, output, *words):
    steps = ["--max_steps=4", "--save_strategy=steps", "--save_steps=2", "--logging_steps=1", "--disable_tqdm=true"]
    run_judge.main([*judge_arguments(inputs, output), *steps, *words])


# --- Whose a folder is


def test_a_run_is_compared_with_what_is_known_so_far(tmp_path):
    settings = {"seed": 1, "train_text_digest": "a"}
    claim_output_dir(tmp_path / "run", settings, None)
    assert json.loads((tmp_path / "run" / "run.json").read_text()) == settings
    check_output_dir(tmp_path / "run", {"seed": 1})  # before the text is read
    for other, says in (
        ({"seed": 2}, "seed was 1 there and is 2"),
        (settings | {"train_text_digest": "b"}, "its train text"),
    ):
        with pytest.raises(ValueError, match=f"holds another run: {says}"):
            check_output_dir(tmp_path / "run", other)


def test_a_run_of_an_earlier_version_did_what_is_now_the_default(tmp_path):
    claim_output_dir(tmp_path / "run", {"seed": 1}, None)
    check_output_dir(tmp_path / "run", {"seed": 1, "padding": "unseen", "loss_norm": "tokens", "packing": None})
    with pytest.raises(ValueError, match="padding was None there and is 'eos' here"):
        check_output_dir(tmp_path / "run", {"seed": 1, "padding": "eos"})


def test_another_folder_s_checkpoint_is_where_a_run_begins(inputs, tmp_path):
    """It is used until the run has a checkpoint of its own. A checkpoint in the run's own folder is used as it is."""
    run_mcd.main(mcd_arguments(inputs, tmp_path / "old", num_rounds=1))
    settings = json.loads((tmp_path / "old" / "run.json").read_text())
    start, new = tmp_path / "old" / "checkpoint-2", tmp_path / "new"
    assert find_checkpoint(new, str(start), settings) == start
    claim_output_dir(new, settings | {"learning_rate": 1e-3}, start)
    assert json.loads((new / "run.json").read_text())["started_from"] == {
        "checkpoint": str(start),
        "changed": {"learning_rate": [0.01, 0.001]},
    }
    shutil.copytree(tmp_path / "old" / "checkpoint-4", new / "checkpoint-4")
    assert find_checkpoint(new, str(start), settings | {"learning_rate": 1e-3}) == new / "checkpoint-4"
    assert find_checkpoint(tmp_path / "old", str(start), settings) == start
    with pytest.raises(ValueError, match="seed was 5 there and is 6 here"):
        find_checkpoint(tmp_path / "newer", str(start), settings | {"seed": 6})


# --- The judge


def test_a_judge_is_resumed_bitwise(inputs, tmp_path, capsys):
    text = f"--validation_text={inputs / 'text.txt'}"
    train_judge(inputs, tmp_path / "whole", text)
    printed = capsys.readouterr().out
    figures = json.loads((tmp_path / "whole" / "eval_results.json").read_text())
    assert f"Loss on the validation text: {figures['loss']:.4f} nats per token" in printed
    shutil.copytree(tmp_path / "whole", tmp_path / "again")
    for name in ("checkpoint-4", "model.safetensors"):
        path = tmp_path / "again" / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    train_judge(inputs, tmp_path / "again", text)
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "again"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_judge_stops_at_a_loss_that_is_not_finite(inputs, tmp_path):
    with pytest.raises(SystemExit) as stop:
        train_judge(inputs, tmp_path / "run", "--learning_rate=1e30")
    assert "is nan at step" in stop.value.code or "is inf at step" in stop.value.code
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_judge_s_folder_of_another_run_is_refused(inputs, tmp_path):
    train_judge(inputs, tmp_path / "run", "--max_steps=1", "--save_steps=1")
    with pytest.raises(SystemExit) as stop:
        train_judge(inputs, tmp_path / "run", "--max_steps=1", "--save_steps=1", "--learning_rate=1e-3")
    assert "holds another run: learning_rate was 5e-05 there and is 0.001 here" in stop.value.code


# --- Recipes and figures


def test_the_recipe_of_the_card_runs_as_it_stands(inputs, tmp_path, monkeypatch):
    """It runs from the folder in which the run was started, names no path of the machine, and states the precision that
    was used.
    """
    monkeypatch.chdir(inputs)
    run_mcd.main(mcd_arguments(inputs, inputs / "first", max_steps=2, gradient_accumulation_steps=2))
    recipe = json.loads((inputs / "first" / "eval.json").read_text())["recipe"]
    assert str(inputs) not in recipe and str(Path.home()) not in recipe
    settings = yaml.safe_load(recipe)
    assert settings["per_device_train_batch_size"] == 8 and settings["gradient_accumulation_steps"] == 2
    assert settings["output_dir"] == "first" and settings["block_length"] == BLOCK and settings["bf16"] is False
    (inputs / "card.yaml").write_text(recipe)
    run_mcd.main(["card.yaml", "--output_dir", str(tmp_path / "second"), "--save_steps", "1", "--logging_steps", "1"])
    one, other = (load_file(folder / "model.safetensors") for folder in (inputs / "first", tmp_path / "second"))
    assert all(torch.equal(one[key], other[key]) for key in one)


def test_paths_that_only_this_machine_has(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert portable_path(str(RECIPE_FOLDER / "tiny" / "text")) == "./tiny/text"
    assert portable_path(str(tmp_path / "data" / "a.txt")) == "data/a.txt"
    assert portable_path("/home/someone/data/a.txt") == "a.txt"
    assert [portable_path(value) for value in ("acme/novels", "./a", 3, None)] == ["acme/novels", "./a", 3, None]


def test_figures_that_are_not_finite_are_null(inputs, tmp_path, monkeypatch):
    monkeypatch.setattr(run_mdlm, "validation_nelbo", lambda *arguments: float("inf"))
    run_mdlm.main([*mdlm_arguments(inputs, tmp_path / "run"), f"--validation_text={inputs / 'text.txt'}"])
    assert json.loads((tmp_path / "run" / "eval_results.json").read_text()) == {"nelbo": None}


def test_an_output_dir_must_be_given():
    with pytest.raises(TypeError, match="output_dir"):
        ExactResumeArguments()
