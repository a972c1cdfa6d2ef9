"""The examples run, and do what they say."""

import importlib.util
import sys

import pytest
import torch
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
