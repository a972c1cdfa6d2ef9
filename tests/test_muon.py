"""Muon: orthogonal steps of AdamW's size for the matrices inside a network, AdamW for the rest, exact resume."""

import pytest
import torch

from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.muon import Float32Muon, MuonAndAdamW, inner_matrices


def test_the_matrices_are_those_inside_the_network(model):
    names = inner_matrices(model)
    shapes = dict(model.named_parameters())
    assert "model.layers.1.attention.qkv_proj.weight" in names and "model.layers.0.mlp.down_proj.weight" in names
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & names
    assert all(shapes[name].ndim == 2 for name in names)


def test_matrices_are_stepped_by_muon_and_all_else_by_adamw(build, tmp_path):
    """The step of a matrix is orthogonal and of AdamW's size; the others take torch's AdamW, with the same decay."""
    settings = {"learning_rate": 0.01, "weight_decay": 0.1, "adam_beta2": 0.98, "muon": True, "use_cpu": True}
    blocks = [{"input_ids": [3] * 8}] * 8
    trainer = MDLMTrainer(build(), MDLMTrainingArguments(output_dir=str(tmp_path), **settings), train_dataset=blocks)
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    theirs = dict(build().named_parameters())
    plain = torch.optim.AdamW(
        [
            {"params": [p for n, p in theirs.items() if n in decayed], "weight_decay": 0.1},
            {"params": [p for n, p in theirs.items() if n not in decayed], "weight_decay": 0.0},
        ],
        lr=0.01,
        betas=(0.9, 0.98),
    )
    muon, ours = trainer.create_optimizer(), dict(trainer.model.named_parameters())
    start = {name: parameter.detach().clone() for name, parameter in ours.items()}
    for step in range(3):
        for parameter in (*ours.values(), *theirs.values()):
            parameter.grad = (parameter.detach() + step).sin()
        muon.step()
        plain.step()
        if step == 0:
            first = {name: parameter.detach().clone() for name, parameter in ours.items()}
    matrices = inner_matrices(trainer.model)
    for name, parameter in ours.items():
        if name not in matrices:
            torch.testing.assert_close(parameter, theirs[name], msg=name)
            continue
        update = (first[name] - start[name] * (1 - 0.01 * 0.1)) / (-0.2 * 0.01 * max(parameter.shape) ** 0.5)
        left, _, right = torch.linalg.svd(start[name].sin(), full_matrices=False)
        inner = left.T @ update @ right.T
        values, count = inner.diagonal(), min(parameter.shape)
        assert values.max() < 1.3 and values.median() > 0.6 and (inner - values.diag()).abs().max() < 0.1, name
        assert update.square().mean().sqrt() * max(parameter.shape) ** 0.5 == pytest.approx(1, rel=0.25), (name, count)


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_steps_in_float32_are_those_of_torch(shape):
    """torch rounds to bfloat16, whose error the momentum keeps."""
    start = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    settings = {"lr": 0.01, "weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    optimizers = Float32Muon([ours], **settings), torch.optim.Muon([theirs], **settings)
    for step in range(4):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = (start * (step + 1)).sin()
            optimizer.step()
    moved = (theirs - start).detach()
    assert ((ours - theirs).norm() / moved.norm()).item() < 0.02


def test_a_vanishing_gradient_gives_no_step():
    parameter = torch.nn.Parameter(torch.zeros(4, 6))
    parameter.grad = torch.zeros(4, 6)
    Float32Muon([parameter], lr=1.0).step()
    assert parameter.detach().abs().max() == 0


def test_resume_with_muon_is_bitwise(build, tmp_path):
    blocks = [
        {"input_ids": row} for row in torch.randint(0, 46, (8, 8), generator=torch.Generator().manual_seed(0)).tolist()
    ]

    def run(folder: str, steps: int, resume: bool = False) -> dict[str, torch.Tensor]:
        options = {
            "max_steps": 4,
            "save_steps": 2,
            "logging_steps": 1,
            "warmup_steps": 0,
            "learning_rate": 0.01,
            "report_to": "none",
        }
        options |= {"per_device_train_batch_size": 4, "use_cpu": True, "disable_tqdm": True, "muon": True}
        arguments = MDLMTrainingArguments(output_dir=str(tmp_path / folder), **options)
        trainer = MDLMTrainer(build(), arguments, train_dataset=blocks)
        trainer.train(str(tmp_path / "all" / f"checkpoint-{steps}") if resume else None)
        assert isinstance(trainer.optimizer.optimizer, MuonAndAdamW)
        return trainer.model.state_dict()

    once, again = run("all", 4), run("again", 2, resume=True)
    assert all(torch.equal(once[name], again[name]) for name in once)
    assert not torch.equal(
        once["model.layers.0.mlp.up_proj.weight"], build().state_dict()["model.layers.0.mlp.up_proj.weight"]
    )


def test_muon_with_sharded_matrices_or_another_optimizer_is_refused(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match="optim is 'sgd', but muon brings its own optimizer"):
        MDLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, muon=True, optim="sgd")
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="muon is true, but DeepSpeed shards"):
        MDLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, muon=True)
