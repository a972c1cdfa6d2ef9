"""FSDP2 in two processes on a CPU: for every method the losses and networks of one process; resumed, saved and judged."""

import json
from pathlib import Path

import pytest
import torch
from fsdp_launch import CASES
from safetensors.torch import load_file
from tiny_run import start_python
from transformers import AutoModel

from evaluation import load_report
from evaluation.judge import fingerprint
from modeling_mcd.files import read_object
from trainers.checkpoints import MANIFEST, fault_of


pytestmark = pytest.mark.slow
HERE = Path(__file__).resolve().parent
RUN = f"import sys; sys.path.insert(0, {str(HERE)!r}); from fsdp_launch import main; main(*sys.argv[1:])"
SAVED = [case for case, (_, changes, _) in CASES.items() if changes.get("save_steps") == 3]
# Their loss is a mean over the masked tokens of each process: the losses are those of DDP, not of one process.
REFERENCES = {"sdtt": "sdtt, ddp", "dscd": "dscd, ddp", "mcd, bf16": "mcd, bf16, ddp"}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """The folders of all cases in two processes and in one."""
    folder = tmp_path_factory.mktemp("runs")
    processes = [start_python(RUN, str(folder), str(rank), "2") for rank in range(2)]
    for result in [process.complete() for process in [*processes, start_python(RUN, str(folder), "0", "1")]]:
        assert result.returncode == 0, result.stderr[-6000:]
    return folder / "2", folder / "1"


def facts(folder):
    return json.loads((folder / "facts.json").read_text())


def losses(folder):
    return [entry["loss"] for entry in facts(folder)["log"] if "loss" in entry]


@pytest.mark.parametrize("case", [case for case, (_, _, fsdp) in CASES.items() if fsdp is not None])
def test_the_losses_and_networks_of_an_undivided_run(case, runs):
    several, one = runs
    ours, theirs = several / case, several / REFERENCES[case] if case in REFERENCES else one / case
    tolerance = 2e-3 if "bf16" in case else 1e-5
    assert len(losses(ours)) == 4 and losses(ours) == pytest.approx(losses(theirs), abs=tolerance)
    student, expected = (load_file(folder / "student.safetensors") for folder in (ours, theirs))
    assert student.keys() == expected.keys()
    assert max((student[name] - expected[name]).abs().max().item() for name in expected) < tolerance
    assert "bf16" in case or facts(ours)["tokens"] == facts(theirs)["tokens"]


@pytest.mark.parametrize("case", SAVED)
def test_stopped_and_resumed_is_bitwise_the_same_run(case, runs):
    whole, resumed = runs[0] / case, runs[0] / f"{case}, resumed"
    assert losses(resumed) == losses(whole)
    student, expected = (load_file(folder / "student.safetensors") for folder in (resumed, whole))
    assert all(torch.equal(student[name], expected[name]) for name in expected)


def test_every_process_holds_and_saves_its_part(runs):
    """Student, teacher and EMA each; the files hold complete tensors, and the manifest knows them all."""
    run, folder = facts(runs[0] / "mcd"), runs[0] / "mcd" / "checkpoint-3"
    assert all(0.45 < part / run["complete"] < 0.55 for part in run["parts"]) and len(run["parts"]) == 3
    files = [f"{name}/model-0000{k}-of-00002.safetensors" for name in ("ema", "teacher") for k in (1, 2)]
    assert set(files) <= read_object(folder / MANIFEST)["files"].keys() and fault_of(folder) is None
    shapes = {name: value.shape for file in files[:2] for name, value in load_file(folder / file).items()}
    assert shapes == {name: value.shape for name, value in load_file(runs[0] / "mcd" / "student.safetensors").items()}
    (folder / files[1]).rename(folder / "aside")
    assert fault_of(folder) == f"{files[1]} is missing"
    (folder / "aside").rename(folder / files[1])


def test_teacher_and_student_share_a_divided_base(runs):
    shared = facts(runs[0] / "mcd, lora")["shared"]
    assert len(shared) > 20 and all(shared)


def test_a_checkpoint_loads_like_any_other(runs):
    ours, theirs = (run / "mcd" / "checkpoint-3" for run in runs)
    code = [{path.name for path in folder.glob("*.py")} for folder in (ours, theirs)]
    assert code[0] == code[1] and "modeling_mdlm.py" in code[0]
    configs = [json.loads((folder / "config.json").read_text()) for folder in (ours, theirs)]
    assert configs[0] == configs[1] and configs[0]["architectures"] == ["MDLMForMaskedDiffusion"]
    networks = [dict(AutoModel.from_pretrained(folder).named_parameters()) for folder in (ours, theirs)]
    assert all((networks[0][name] - value).abs().max() < 1e-5 for name, value in networks[1].items())


@pytest.mark.parametrize("case", [case for case, (_, _, fsdp) in CASES.items() if fsdp is not None])
def test_each_process_generates_for_itself_from_a_divided_network(case, runs):
    run = facts(runs[0] / case)
    assert run["weights"] == run["weights complete"]
    assert "bf16" in case or run["tokens together"] == run["tokens"]


def test_a_judged_command_has_the_figures_of_one_process(runs):
    """And no process ever has a complete network that is divided, but the first one to save it."""
    rows, expected = ({row["model"]: row for row in load_report(run / "command")["results"]} for run in runs)
    assert list(rows) == list(expected) == ["teacher", "round-1", "round-2"]
    for name, row in rows.items():
        assert row["gen_ppl"] == pytest.approx(expected[name]["gen_ppl"], rel=1e-4), name
        assert row["weights"] == fingerprint(AutoModel.from_pretrained(runs[0] / "command" / name))
    final = [load_file(run / "command" / "model.safetensors") for run in runs]
    assert max((final[0][name] - value).abs().max().item() for name, value in final[1].items()) < 1e-4
