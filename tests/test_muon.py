"""Muon: orthogonal steps for the matrices inside a network, AdamW for the rest, exact resume."""

import pytest
import torch

from trainers.mdlm_trainer import MDLMTrainer, MDLMTrainingArguments
from trainers.muon import Muon, inner_matrices, orthogonal


@pytest.mark.parametrize("shape", [(24, 96), (96, 24), (32, 32)])
def test_a_step_is_orthogonal_and_keeps_the_singular_vectors(shape):
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, _, right = torch.linalg.svd(matrix, full_matrices=False)
    inner = left.T @ orthogonal(matrix) @ right.T
    values = inner.diagonal()
    assert 0.6 < values.min() and values.max() < 1.3
    torch.testing.assert_close(inner, values.diag(), atol=1e-3, rtol=0)


def test_a_vanishing_gradient_gives_no_step():
    assert orthogonal(torch.zeros(4, 6)).abs().max() == 0


def test_the_matrices_are_those_inside_the_network(model):
    names = inner_matrices(model)
    shapes = dict(model.named_parameters())
    assert "model.layers.1.attention.qkv_proj.weight" in names and "model.layers.0.mlp.down_proj.weight" in names
    assert not {"lm_head.weight", "model.embed_tokens.weight"} & names
    assert all(shapes[name].ndim == 2 for name in names)


def test_what_is_no_matrix_is_stepped_by_adamw():
    start = torch.randn(5, 7, generator=torch.Generator().manual_seed(0))
    settings = {"lr": 0.01, "betas": (0.9, 0.98), "eps": 1e-8}
    ours, theirs = (torch.nn.Parameter(start.clone()) for _ in range(2))
    optimizers = [
        Muon([{"params": [ours], "weight_decay": 0.1}], **settings),
        torch.optim.AdamW([{"params": [theirs], "weight_decay": 0.1}], **settings),
    ]
    for step in range(4):
        for parameter, optimizer in zip((ours, theirs), optimizers, strict=True):
            parameter.grad = (parameter.detach() + step).sin()
            optimizer.step()
    torch.testing.assert_close(ours, theirs)


def test_a_matrix_s_step_has_the_size_of_adamw_s():
    parameter = torch.nn.Parameter(torch.zeros(48, 96))
    parameter.grad = torch.randn(48, 96, generator=torch.Generator().manual_seed(0))
    Muon([{"params": [parameter], "muon": True}], lr=0.01, betas=(0.9, 0.98), eps=1e-8).step()
    assert parameter.detach().square().mean().sqrt().item() == pytest.approx(0.2 * 0.01, rel=0.2)


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
        assert isinstance(trainer.optimizer.optimizer, Muon)
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
