"""Muon for the matrices inside a network and AdamW for all else, as one optimizer.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) makes the step of a matrix orthogonal; its size is that of
Moonlight (arXiv 2502.16982, Eq. 4), whose root mean square is 0.2 of the learning rate, so that AdamW's learning rate fits both.
"""

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Muon, Optimizer


class Float32Muon(Muon):
    """torch's Muon with its products in float32: those in bfloat16 take 12 to 44 times as long on a CPU with AVX2 alone."""

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                momentum = self.state[parameter].setdefault("momentum_buffer", torch.zeros_like(parameter))
                momentum.lerp_(parameter.grad, 1 - group["momentum"])
                update = orthogonal(parameter.grad.lerp(momentum, group["momentum"]), group["ns_coefficients"])
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                parameter.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])


def orthogonal(matrix: Tensor, coefficients: tuple[float, float, float]) -> Tensor:
    """The matrix [M, N] with all singular values x brought near 1: x becomes a x + b x^3 + c x^5, five times in a row."""
    a, b, c = coefficients
    tall = matrix.size(0) > matrix.size(1)
    x = matrix.T if tall else matrix
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.T if tall else x


def inner_matrices(model: nn.Module) -> set[str]:
    """The names of the weights of all linear layers but the head: what Muon is for."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and layer.weight.requires_grad
    }


def build_muon(model: nn.Module, args, decayed: set[str]) -> "MuonAndAdamW":
    """The optimizer of all trained parameters; `decayed` names those with weight decay, as `Trainer` chooses them."""
    inner, matrices, others = inner_matrices(model), {}, {}  # weight decay -> group
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups, decay = matrices if name in inner else others, args.weight_decay if name in decayed else 0.0
            groups.setdefault(decay, {"params": [], "weight_decay": decay})["params"].append(parameter)
    parts = []
    if matrices:
        kind = Float32Muon if model.device.type == "cpu" else Muon
        parts.append(kind(list(matrices.values()), args.learning_rate, adjust_lr_fn="match_rms_adamw"))
    if others:
        betas = args.adam_beta1, args.adam_beta2
        parts.append(AdamW(list(others.values()), args.learning_rate, betas, args.adam_epsilon, fused=True))
    return MuonAndAdamW(parts)


class MuonAndAdamW(Optimizer):
    """Several optimizers that step together; their groups and states are one, for schedulers and checkpoints."""

    def __init__(self, parts: list[Optimizer]):
        self.parts = parts
        super().__init__([group for part in parts for group in part.param_groups], {})
        self._share()

    def __setstate__(self, state: dict):
        """Called by `load_state_dict`, with new groups and states."""
        super().__setstate__(state)
        self._share()

    def _share(self):
        groups = iter(self.param_groups)
        for part in self.parts:
            part.state, part.param_groups = self.state, [next(groups) for _ in part.param_groups]

    def step(self, closure=None):
        loss = None if closure is None else closure()
        for part in self.parts:
            part.step()
        return loss
