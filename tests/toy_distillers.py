"""Small networks, data and trainers of every distillation method, for the tests."""

import copy
import math

import torch
from tiny_run import BLOCK, write_inputs
from transformers import AutoModel

from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from trainers import run_mcd
from trainers.batches import collate_blocks
from trainers.trajectories import step_noise


K, MASK, ROWS, SEED = 48, 47, 4, 11
SETTINGS = {
    "mcd": {"delta": 0.125},
    "sdtt": {"delta": 0.125},
    "dcd": {"delta": 0.125},
    "mpdc": {"anchor_fraction": 0.35},
    "coupling": {"states": 4},
}
METHODS = {
    name: (trainer, arguments, SETTINGS.get(name, {})) for name, (trainer, arguments, _) in run_mcd.METHODS.items()
}


def make_networks(folder):
    """Teacher and student of each diffusion kind, float64, with random weights."""
    masked = AutoModel.from_pretrained(write_inputs(folder) / "teacher")
    shapes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "conditioning_size": 8}
    uniform = MDLMForMaskedDiffusion(
        MDLMConfig(vocab_size=K, max_position_embeddings=BLOCK, diffusion_kind="uniform", hidden_dropout=0.0, **shapes)
    )
    generator, pairs = torch.Generator().manual_seed(1), {}
    for kind, teacher in (("absorbing", masked), ("uniform", uniform)):
        with torch.no_grad():
            for parameter in teacher.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
            student = type(teacher)(teacher.config)
            for name, parameter in student.named_parameters():
                noise = 0.1 * torch.randn(parameter.shape, generator=generator)
                parameter.copy_(teacher.get_parameter(name) + noise)
        pairs[kind] = teacher.double().eval(), student.double()
    return pairs


def make_trainer(method, networks, folder, **changes):
    trainer_class, arguments_class, settings = METHODS[method]
    teacher, student = networks[trainer_class.diffusion_kind]
    settings = {"num_rounds": 2, "steps_per_round": 4, "ema_decay": None, "save_strategy": "no"} | settings
    settings |= {"per_device_train_batch_size": ROWS} | changes
    arguments = arguments_class(output_dir=str(folder), seed=SEED, **settings)
    if method == "coupling":  # it would freeze the network that other tests train; and a new chain changes nothing
        student = copy.deepcopy(student)
        if student.coupling is None:
            student.add_coupling(arguments.coupling())
            for parameter in student.coupling.parameters():
                parameter.data.normal_(generator=torch.Generator().manual_seed(3))
    teacher = {"teacher": teacher} if trainer_class.has_teacher else {}
    trainer = trainer_class(student, arguments, **teacher)
    trainer.model.train()
    return trainer


def blocks():
    return torch.randint(0, 46, (ROWS, BLOCK), generator=torch.Generator().manual_seed(2))


def prompted():
    """Four rows of different lengths, the first tokens of each a prompt."""
    rows = []
    for i, row in enumerate(blocks().tolist()):
        length, prompt = BLOCK - 3 * i, 5 + i
        rows.append({"input_ids": row[:length], "labels": [-100] * prompt + row[prompt:length]})
    return collate_blocks(rows)


# --- The formulas' ingredients, for losses written out token by token


def noise(step, draws=2):
    return step_noise(SEED, step, range(ROWS), ROWS, BLOCK, draws)


def log_probabilities(model, z, gamma, inputs, temperature=1.0):
    """Full log-probabilities [B, L, V], SUBS for a masked model: float64."""
    mask_token_id = model.config.mask_token_id
    with torch.no_grad():
        logits = model(
            input_ids=z, timesteps=-gamma.log().float(), attention_mask=inputs.get("attention_mask")
        ).logits.double()
    if mask_token_id is not None:
        logits[..., mask_token_id] = -math.inf
    return (logits / temperature).log_softmax(-1)


def mask(x_0, u, gamma, maskable):
    return torch.where((u > gamma[:, None]) & maskable, MASK, x_0)


def assert_same_step(trainer, inputs: dict, by_hand, **tolerance):
    """A trainer's loss and gradients are those that it has with `by_hand` in place of `compute_rows`."""
    found = []
    for compute_rows in (trainer.compute_rows, by_hand):
        trainer.compute_rows = compute_rows
        trainer.reset_noise()
        loss = trainer.compute_loss(trainer.model, inputs)
        loss.backward()
        found.append({"loss": loss.detach()} | {n: p.grad for n, p in trainer.model.named_parameters()})
        trainer.model.zero_grad()
    ours, theirs = found
    used = [n for n in ours if theirs[n] is not None and theirs[n].abs().max() > 0]
    if trainer.trains_network:
        assert len(used) > 15
    else:
        assert used == ["loss", *(f"coupling.{name}" for name in ("powers", "start", "transition", "emission"))]
    for n in used:
        torch.testing.assert_close(ours[n], theirs[n], **tolerance, msg=lambda m, n=n: f"{n}: {m}")
