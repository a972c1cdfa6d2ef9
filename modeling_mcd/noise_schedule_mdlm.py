"""Noise schedules gamma(t): the probability that a token is still visible at time t (t = 0 clean, t = 1 noise)."""

import math
from dataclasses import dataclass

import torch

from .checks_mdlm import INSIDE_0_1, check_numbers


@dataclass(frozen=True)
class LogLinearSchedule:
    """gamma(t) = 1 - (1 - epsilon) t, MDLM's schedule: sigma(t) = -log gamma(t), and the NELBO weight is exactly 1/t."""

    epsilon: float = 1e-3

    def __post_init__(self):
        check_numbers(self, epsilon=INSIDE_0_1)

    def gamma(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - (1 - self.epsilon) * t

    def inverse(self, gamma: torch.Tensor) -> torch.Tensor:
        return (1 - gamma) / (1 - self.epsilon)

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, -(1 - self.epsilon))


@dataclass(frozen=True)
class LinearSchedule:
    """gamma(t) = 1 - t, the schedule of LLaDA (arXiv 2502.09992, Eq. 6): nothing is visible at t = 1."""

    def gamma(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - t

    def inverse(self, gamma: torch.Tensor) -> torch.Tensor:
        return 1 - gamma

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        return torch.full_like(t, -1)


@dataclass(frozen=True)
class CosineSchedule:
    """gamma(t) = 1 - cos(pi/2 (1 - t')), t' = (1 - epsilon) t (Duo, arXiv 2506.10892)."""

    epsilon: float = 1e-3

    def __post_init__(self):
        check_numbers(self, epsilon=INSIDE_0_1)

    def gamma(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - torch.cos(math.pi / 2 * (1 - (1 - self.epsilon) * t))

    def inverse(self, gamma: torch.Tensor) -> torch.Tensor:
        return (1 - 2 / math.pi * torch.acos(1 - gamma)) / (1 - self.epsilon)

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        return -math.pi / 2 * (1 - self.epsilon) * torch.sin(math.pi / 2 * (1 - (1 - self.epsilon) * t))


NoiseSchedule = LogLinearSchedule | LinearSchedule | CosineSchedule
NOISE_SCHEDULES = {"log_linear": LogLinearSchedule, "cosine": CosineSchedule}  # those with an epsilon


def noise_schedule_of(config) -> NoiseSchedule:
    """The schedule that a model's configuration names."""
    if config.noise_schedule == "linear":
        return LinearSchedule()
    return NOISE_SCHEDULES[config.noise_schedule](config.noise_epsilon)
