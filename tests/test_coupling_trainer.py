"""Teaching a coupling: on the sampler's own plans, the chain alone, and what cannot be taught."""

import copy

import pytest
import torch
from toy_distillers import blocks, make_trainer, prompted

from modeling_mcd.reveal_grid_mdlm import ancestral_reveal_steps
from trainers import CouplingTrainingArguments


def test_training_is_on_the_samplers_own_plans(networks, tmp_path):
    """The plans of `plan_steps`, as `ancestral` makes them from the same rho; each step of each equally often."""
    trainer = make_trainer("coupling", networks, tmp_path, plan_steps=[1, 2, 4], per_device_train_batch_size=4)
    maskable = torch.ones(4, 16, dtype=torch.bool)
    seen = set()
    for step in range(30):
        trainer.state.global_step = step
        times, u = trainer.noise_of_batch(maskable)
        masked, revealed, gamma, weights = trainer.plan(times, u, maskable)
        rho = u[:, 0]
        for row in range(4):
            n = int(weights[row])
            k = round((gamma[row].item() - 1e-3) / (1 - 1e-3) * n)
            seen.add((n, k))
            start = rho[row] * 2**32
            bits = [int(f"{(i + int(start)) % 2**32:032b}"[::-1], 2) for i in range(16)]
            locked = torch.tensor([(b + float(start) % 1) / 2**32 for b in bits], dtype=torch.float64)
            plan = ancestral_reveal_steps(locked, n, trainer.schedule)
            assert torch.equal(revealed[row], plan == k) and torch.equal(masked[row], plan >= k)
    assert seen == {(1, 0), (2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)}


@pytest.mark.parametrize(
    "changes",
    [{"plan_steps": None}, {"coupling_window": 5}, {"emission": "embedding"}, {"bf16": True}, {"shared": False}],
)
def test_only_the_chain_learns_and_it_learns(changes, networks, tmp_path):
    changes = {"window" if name == "coupling_window" else name: value for name, value in changes.items()}
    kept = copy.deepcopy(networks)
    if changes.get("bf16"):
        for network in kept["absorbing"]:
            network.float()
    trainer = make_trainer(
        "coupling",
        kept,
        tmp_path,
        steps_per_round=12,
        num_rounds=1,
        report_to="none",
        disable_tqdm=True,
        states=8,
        learning_rate=0.1,
        **changes,
    )
    before = copy.deepcopy(trainer.model.state_dict())
    trainer.train_dataset = [{"input_ids": [1, 2] * 8}, {"input_ids": [2, 1] * 8}] * 24
    losses = [trainer.compute_loss(trainer.model, {"input_ids": torch.tensor([[1, 2] * 8, [2, 1] * 8] * 2)}).item()]
    trainer.reset_noise()
    trainer.train()
    trainer.state.global_step = 0
    trainer.reset_noise()
    trainer.model.train()
    losses.append(
        trainer.compute_loss(trainer.model, {"input_ids": torch.tensor([[1, 2] * 8, [2, 1] * 8] * 2)}).item()
    )
    assert losses[1] < losses[0] - 0.1
    for name, value in trainer.model.state_dict().items():
        assert name.startswith("coupling") != torch.equal(value, before[name]), name


def test_the_trunk_is_taught_without_dropout(networks, tmp_path):
    trainer = make_trainer("coupling", networks, tmp_path)
    for layer in trainer.model.model.layers:
        layer.dropout.p = 0.5
    first = trainer.compute_loss(trainer.model, prompted()).item()
    trainer.reset_noise()
    assert trainer.compute_loss(trainer.model.train(), prompted()).item() == first


def test_other_methods_leave_a_coupling_as_it_is(networks, tmp_path):
    kept = copy.deepcopy(networks)
    for network in kept["absorbing"]:
        network.add_coupling({"states": 3})
    trainer = make_trainer("mcd", kept, tmp_path)
    trainer.compute_loss(trainer.model, {"input_ids": blocks()}).backward()
    assert all(parameter.requires_grad == (parameter.grad is not None) for parameter in trainer.model.parameters())
    assert not trainer.model.coupling.start.requires_grad


def test_a_model_that_has_a_chain_goes_on_with_it(networks, tmp_path):
    kept = copy.deepcopy(networks)
    kept["absorbing"][1].add_coupling({"states": 3})
    kept["absorbing"][1].coupling.start.data.fill_(2.0)
    trainer = make_trainer("coupling", kept, tmp_path, states=3)
    assert (trainer.model.coupling.start == 2).all()
    with pytest.raises(ValueError, match="the model's coupling is .*'states': 3.*but the recipe says .*'states': 4"):
        make_trainer("coupling", kept, tmp_path, states=4)


def test_a_shared_chain_goes_on_as_one_for_each_level(networks, tmp_path):
    kept = copy.deepcopy(networks)
    kept["absorbing"][1].add_coupling({"states": 3})
    for parameter in kept["absorbing"][1].coupling.parameters():
        parameter.data.normal_(generator=torch.Generator().manual_seed(parameter.numel()))
    one = make_trainer("coupling", copy.deepcopy(kept), tmp_path, states=3)
    settings = {"steps_per_round": 4, "num_rounds": 1, "report_to": "none", "disable_tqdm": True}
    separate = make_trainer("coupling", copy.deepcopy(kept), tmp_path, states=3, shared=False, **settings)
    losses = [trainer.compute_loss(trainer.model, {"input_ids": blocks()}).item() for trainer in (one, separate)]
    separate.reset_noise()
    assert losses[1] == pytest.approx(losses[0], rel=1e-6)
    before = separate.model.coupling.transition.clone()
    separate.train_dataset = [{"input_ids": row.tolist()} for row in blocks()] * 12
    separate.train()
    separate.save_model()
    assert not separate.model.config.coupling["shared"] and (separate.model.coupling.transition != before).any()
    loaded = type(separate.model).from_pretrained(tmp_path)
    assert torch.equal(loaded.coupling.transition, separate.model.coupling.transition)
    for wrong in ({"states": 4, "shared": False}, {"states": 3, "shared": False, "levels": 2}):
        with pytest.raises(ValueError, match="the model's coupling is .*but the recipe says"):
            make_trainer("coupling", copy.deepcopy(kept), tmp_path, **wrong)
    with pytest.raises(
        ValueError, match="the model's coupling is .*'shared': False.*but the recipe says .*'shared': True"
    ):
        make_trainer("coupling", {**kept, "absorbing": (loaded, loaded)}, tmp_path, states=3)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"plan_steps": []}, "plan_steps must be one or more numbers of steps"),
        ({"plan_steps": [0]}, "plan_steps must be an integer of at least 1, not 0"),
        ({"emission": "x"}, "emission must be one of"),
        ({"spread_fraction": 0.5}, r"spread_fraction \(0.5\) is for teaching networks"),
    ],
)
def test_wrong_arguments_of_the_trainer_are_refused(changes, says):
    with pytest.raises(ValueError, match=says):
        CouplingTrainingArguments(output_dir="unused", **changes)


def test_other_networks_are_refused(networks, tmp_path):
    from transformers import BertConfig, BertForMaskedLM

    from trainers import CouplingTrainer

    arguments = CouplingTrainingArguments(output_dir=str(tmp_path), ema_decay=None)
    small = BertConfig(vocab_size=48, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)
    with pytest.raises(ValueError, match="a BertForMaskedLM cannot have a coupling"):
        CouplingTrainer(BertForMaskedLM(small), arguments)
    with pytest.raises(ValueError, match="coupling .* must be null under uniform diffusion"):
        CouplingTrainer(copy.deepcopy(networks["uniform"][1]), arguments)
