"""Muon for the matrices inside a network and AdamW for all else: fewer steps to the same loss than AdamW alone.

Muon (Jordan et al., 2024, kellerjordan.github.io/posts/muon) makes the step of a matrix orthogonal; its size is that of
Moonlight (arXiv 2502.16982, Eq. 4), whose root mean square is 0.2 of the learning rate, so that AdamW's learning rate fits both.
"""

import torch
from torch import Tensor, nn


MOMENTUM = 0.95
# x -> a x + b x^3 + c x^5: five times in a row, it brings (0, 1] to between 0.7 and 1.2.
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


def orthogonal(matrices: Tensor) -> Tensor:
    """The float32 matrices [..., M, N] with all singular values brought near 1, by five Newton-Schulz steps."""
    a, b, c = NEWTON_SCHULZ
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


def inner_matrices(model: nn.Module) -> set[str]:
    """The names of the weights of all linear layers but the head: what Muon is for."""
    head = model.get_output_embeddings()
    return {
        f"{name}.weight"
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and layer.weight.requires_grad
    }


def build_muon(model: nn.Module, args, decayed: set[str]) -> "Muon":
    """The optimizer of all trained parameters; `decayed` names those with weight decay, as `Trainer` chooses them."""
    matrices, groups = inner_matrices(model), {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            groups.setdefault((name in matrices, name in decayed), []).append(parameter)
    groups = [
        {"params": parameters, "muon": muon, "weight_decay": args.weight_decay if decays else 0.0}
        for (muon, decays), parameters in groups.items()
    ]
    return Muon(groups, args.learning_rate, (args.adam_beta1, args.adam_beta2), args.adam_epsilon)


class Muon(torch.optim.Optimizer):
    """Groups with `muon=True` hold matrices; the others are stepped by AdamW with the settings of their group.

    Args:
        groups: the parameters, each group with `muon` and `weight_decay`.
        lr, betas, eps: as AdamW's; Muon takes `lr` alone.
    """

    def __init__(self, groups: list[dict], lr: float, betas: tuple[float, float], eps: float):
        super().__init__(groups, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": 0.0, "muon": False})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            parameters = [parameter for parameter in group["params"] if parameter.grad is not None]
            for parameter in parameters:
                parameter.mul_(1 - group["lr"] * group["weight_decay"])
                (self._muon if group["muon"] else self._adam)(parameter, group)
        return loss

    def _muon(self, parameter: Tensor, group: dict):
        state = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        update = orthogonal(parameter.grad.lerp(state["momentum"], MOMENTUM))
        parameter.add_(update, alpha=-0.2 * max(parameter.shape) ** 0.5 * group["lr"])

    def _adam(self, parameter: Tensor, group: dict):
        state, (first, second) = self.state[parameter], group["betas"]
        if not state:
            state["step"] = torch.zeros(())
            state["mean"], state["square"] = torch.zeros_like(parameter), torch.zeros_like(parameter)
        state["step"] += 1
        step = state["step"].item()
        state["mean"].lerp_(parameter.grad, 1 - first)
        state["square"].mul_(second).addcmul_(parameter.grad, parameter.grad, value=1 - second)
        scale = (state["square"] / (1 - second**step)).sqrt_().add_(group["eps"])
        parameter.addcdiv_(state["mean"], scale, value=-group["lr"] / (1 - first**step))
