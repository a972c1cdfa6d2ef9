"""The examples run, and do what they say."""

import importlib.util
import json
import sys
from contextlib import closing

import pytest
import torch
from fork_server import ForkServer
from hub_server import TOKEN, HubServer, environment_of
from tiny_run import ROOT, write_inputs

from modeling_mcd.generation_config_mdlm import MDLMGenerationConfig
from modeling_mcd.noise_schedule_mdlm import NOISE_SCHEDULES
from modeling_mcd.sampling_mdlm import SAMPLERS
from trainers.divergences import DIVERGENCES


@pytest.fixture
def example(tmp_path, monkeypatch):
    """`example(name)`: the module, in an empty folder; what it registers is taken back."""
    monkeypatch.chdir(tmp_path)
    before = [(names, dict(names)) for names in (NOISE_SCHEDULES, SAMPLERS["absorbing"], DIVERGENCES)]

    def load(name: str):
        spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, name, module)  # dataclasses look their types up there
        spec.loader.exec_module(module)
        return module

    yield load
    for names, old in before:
        names.clear()
        names.update(old)


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> str:
    return str(write_inputs(tmp_path_factory.mktemp("inputs")) / "teacher")


def test_own_data_is_learnt(example):
    model = example("own_data").main(steps=2)
    assert model.lm_head.weight.abs().sum() > 0, "a fresh head is zero"


def test_own_noise_schedule_decides_when_tokens_are_revealed(example):
    module = example("own_noise_schedule")
    t, schedule = torch.linspace(0.01, 1, 50, dtype=torch.float64), module.QuadraticSchedule(1e-2)
    torch.testing.assert_close(schedule.inverse(schedule.gamma(t)), t)
    slope = (schedule.gamma(t + 1e-6) - schedule.gamma(t - 1e-6)) / 2e-6
    torch.testing.assert_close(schedule.derivative(t), slope)
    torch.testing.assert_close(module.main(), torch.tensor([7, 5, 3, 1]) / 16, atol=0.03, rtol=0)


def test_own_sampler_goes_from_left_to_right(example, teacher):
    steps = example("own_sampler").main(teacher)
    assert (steps.diff() >= 0).all() and steps.unique().tolist() == list(range(8))
    assert MDLMGenerationConfig(sampler="left_to_right").sampler == "left_to_right"


def test_what_is_not_registered_is_refused():
    with pytest.raises(ValueError, match="sampler must be one of .*'ancestral'"):
        MDLMGenerationConfig(sampler="left_to_right")


def test_own_divergence_has_the_gradient_that_it_says(example, teacher):
    module = example("own_divergence")
    logits, other = torch.randn(2, 5, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_q = other.log_softmax(-1)

    def value(logits):
        return 1 - ((logits.log_softmax(-1) + log_q) / 2).exp().sum(-1)

    logits.requires_grad_()
    (expected,) = torch.autograd.grad(value(logits).sum(), logits)
    values, gradient = module.hellinger(logits.detach().log_softmax(-1), log_q.clone())
    torch.testing.assert_close(gradient, expected)
    torch.testing.assert_close(values, value(logits).detach())
    trainer = module.main(teacher, steps=2)
    found = [row["divergence"] for row in trainer.state.log_history if "divergence" in row]
    assert len(found) == 2 and all(0 <= x <= 1 for x in found)


SMALLER = {
    "STEPS, STEPS_OF_A_ROUND, SAMPLES = 200, 30, 16": "STEPS, STEPS_OF_A_ROUND, SAMPLES = 2, 1, 2",
    "REPOSITORY = None": 'REPOSITORY = "user/from-text"',
    '("train", 300_000), ("validation", 30_000)': '("train", 20_000), ("validation", 5_000)',
}


def code_of(notebook: str) -> str:
    """The code cells in their order."""
    cells = json.loads((ROOT / "examples" / notebook).read_text(encoding="utf-8"))["cells"]
    assert all(
        not cell["outputs"] and cell["execution_count"] is None for cell in cells if cell["cell_type"] == "code"
    )
    return "\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "code")


@pytest.mark.slow
def test_the_notebook_publishes_a_card(tmp_path):
    code = code_of("from_text_to_card.ipynb")
    for old, new in SMALLER.items():
        assert code.count(old) == 1, old
        code = code.replace(old, new)
    with HubServer(TOKEN) as hub, closing(ForkServer(environment_of(hub.endpoint, tmp_path / "hf"))) as python:
        result = python.run(code, cwd=tmp_path)
        assert result.returncode == 0, result.stderr
        files = hub.files("user/from-text")
    assert {"README.md", "model.safetensors", "eval.json", "eval.png", "modeling_mdlm.py"} <= files.keys()
    card = files["README.md"].decode()
    assert "| teacher" in card and "round-3" in card and "user/from-text" in card
    assert (tmp_path / "runs/from_text/replay.html").read_text().count('"step"') > 1
