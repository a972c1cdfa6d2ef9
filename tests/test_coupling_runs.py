"""Runs with a chain: students that keep their teacher's, how they are judged, and a chain trained for a student."""

import contextlib
import io
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import BLOCK, mcd_arguments, save_judge, write_inputs

from evaluation import load_report
from evaluation.table import lowest_bounds
from modeling_mcd.loading import load_model
from trainers import run_mcd
from trainers.runs.recipe import RECIPE_FOLDER


STATES, LEVELS = 3, 2


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    """A teacher, and in `coupled` the same with a chain that says something, for two spread steps; a judge."""
    folder = write_inputs(tmp_path_factory.mktemp("inputs"))
    model = load_model(folder / "teacher")
    model.add_coupling({"states": STATES, "levels": LEVELS})
    torch.manual_seed(0)
    for parameter in model.coupling.parameters():
        parameter.data.normal_()
    model.generation_config.update(locking="spread", steps=2)
    shutil.copytree(folder / "teacher", folder / "coupled")
    model.save_pretrained(folder / "coupled")
    save_judge(folder / "judge")
    return folder


def arguments_for(inputs, output, *words: str, **changes) -> list[str]:
    settings = {"teacher": inputs / "coupled", "num_rounds": 2, "steps_per_round": 2, "save_steps": 1} | changes
    return [*mcd_arguments(inputs, output, **settings), *words]


@pytest.fixture(scope="module")
def distilled(inputs, tmp_path_factory):
    """The folder of a distillation of the coupled teacher, and what it printed."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    judging = {"judge": inputs / "judge", "validation_text": inputs / "text.txt", "evaluation_samples": 2}
    judging |= {"evaluation_bound": 3, "evaluation_coupled_up_to": 2}
    grid = ("--evaluation_steps", "2", "4", "--evaluation_lockings", "spread", "spread+coupling")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        run_mcd.main(arguments_for(inputs, folder, *grid, **judging))
    return folder, out.getvalue()


def weights_of(folder) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_students_keep_the_chain_of_their_teacher(inputs, distilled):
    folder, _ = distilled
    first = weights_of(inputs / "coupled")
    for name in ("", "teacher", "round-1", "round-2"):
        student = weights_of(folder / name)
        for key, value in first.items():
            assert torch.equal(student[key], value) == (key.startswith("coupling.") or name == "teacher"), (name, key)
        again = load_model(folder / name)
        assert again.config.coupling["states"] == STATES
        assert (again.generation_config.locking, again.generation_config.steps) == ("spread", 2)


def test_chains_are_judged_up_to_the_steps_that_they_are_for(distilled):
    folder, printed = distilled
    rows = [row for row in load_report(folder)["results"] if row["steps"] is not None]
    points = {(row["model"], row["locking"], row["steps"]) for row in rows}
    plain = {(name, "spread", n) for name in ("teacher", "round-1", "round-2") for n in (2, 4)}
    plain |= {("teacher", "independent", n) for n in (2, 4)}
    assert points == plain | {(name, "spread+coupling", 2) for name in ("teacher", "round-1", "round-2")}
    assert len(rows) == len(points)
    bounds = {(row["model"], row["locking"]): row["bound"] for row in rows if row["steps"] == 2}
    assert bounds["round-2", "spread"] != bounds["round-2", "spread+coupling"], "the chain was in use"
    for page in (printed, (folder / "README.md").read_text()):
        assert "| round-2 / spread+coupling, bound |" in page
    assert ".generate(steps=2)" in printed


def test_a_run_says_what_has_the_lowest_bound(distilled):
    folder, printed = distilled
    rows = [row for row in load_report(folder)["results"] if row.get("bound") is not None]
    best = {n: min((row for row in rows if row["steps"] == n), key=lambda row: row["bound"]) for n in (2, 4)}
    said = [f"{row['model']} / {row['locking']} at {n} steps ({row['bound']:.3f})" for n, row in best.items()]
    assert f"Lowest bound, nats per token: {', '.join(said)}." in printed
    told = "round-2 has none of them" in printed
    assert told == ("round-2" not in {row["model"] for row in best.values()})
    assert lowest_bounds([row | {"bound": None} for row in rows]) == []


def test_a_run_with_a_chain_resumes_bitwise(inputs, distilled, tmp_path):
    folder, _ = distilled
    shutil.copytree(folder / "checkpoint-3", tmp_path / "run" / "checkpoint-3")
    shutil.copy(folder / "run.json", tmp_path / "run")
    run_mcd.main(arguments_for(inputs, tmp_path / "run", judge=None, validation_text=inputs / "text.txt"))
    before, after = weights_of(folder), weights_of(tmp_path / "run")
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())


def test_an_adapter_is_trained_beside_a_chain(inputs, tmp_path):
    pytest.importorskip("peft")
    run_mcd.main(arguments_for(inputs, tmp_path / "run", lora_r=2, num_rounds=1))
    student, teacher = load_model(tmp_path / "run"), load_model(inputs / "coupled")
    assert torch.equal(student.coupling.emission, teacher.coupling.emission)
    one = {"seed": 0, "steps": 2, "locking": "spread"}
    assert not torch.equal(student.generate(**one), student.generate(**one, coupling=False))


def train_chain(inputs, output, **changes):
    settings = {"tokenizer": inputs / "tokenizer", "train_text": inputs / "text.txt", "block_length": BLOCK}
    settings |= {"validation_text": inputs / "text.txt", "steps_per_round": 2, "states": STATES, "levels": LEVELS}
    settings |= {"judge": "null", "output_dir": output, "disable_tqdm": True, "logging_steps": 1} | changes
    recipe = str(RECIPE_FOLDER / "tiny_coupling.yaml")
    run_mcd.main([recipe, *(f"--{key}={value}" for key, value in settings.items())])


@pytest.mark.parametrize("method", ["mcd", "sdtt"])
def test_a_chain_is_trained_for_a_student(method, inputs, distilled, tmp_path):
    """`tiny_coupling.yaml` on a round of MCD, whose chain goes on, and on one of SDTT, which gets its first."""
    student = distilled[0] / "round-2"
    if method == "sdtt":
        student = tmp_path / "sdtt" / "round-1"
        changes = {"trainer": "sdtt", "delta": None, "num_rounds": 1, "teacher": inputs / "teacher"}
        run_mcd.main(arguments_for(inputs, student.parent, **changes))
    train_chain(inputs, tmp_path / "run", teacher=student)
    before, after = weights_of(student), weights_of(tmp_path / "run")
    for key, value in after.items():
        if key.startswith("coupling."):
            assert key not in before or not torch.equal(value, before[key]), "it learns"
        else:
            assert torch.equal(value, before[key]), "the network is the student's"
    if method == "mcd":
        shift = (after["coupling.transition"] - before["coupling.transition"]).abs().max()
        assert 0 < shift < 0.2, "two steps from where it was, not anew"
    assert load_model(tmp_path / "run").generation_config.steps == 8


def test_a_shared_chain_is_separated_once_and_resumes_bitwise(inputs, tmp_path):
    train_chain(inputs, tmp_path / "run", teacher=inputs / "coupled", shared=False, save_steps=1)
    shutil.copytree(tmp_path / "run" / "checkpoint-1", tmp_path / "again" / "checkpoint-1")
    shutil.copy(tmp_path / "run" / "run.json", tmp_path / "again")
    train_chain(inputs, tmp_path / "again", teacher=inputs / "coupled", shared=False, save_steps=1)
    before, after = weights_of(tmp_path / "run"), weights_of(tmp_path / "again")
    assert before.keys() == after.keys() and all(torch.equal(after[key], value) for key, value in before.items())
    assert len(after["coupling.transition"]) == LEVELS and "coupling.powers" not in after
    assert not load_model(tmp_path / "again").config.coupling["shared"]
