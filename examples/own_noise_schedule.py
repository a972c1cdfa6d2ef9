"""Own noise schedule: three functions, and a name by which a model's configuration asks for it.

python examples/own_noise_schedule.py
"""

from dataclasses import dataclass

import torch

from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from modeling_mcd.noise_schedule_mdlm import NOISE_SCHEDULES


@dataclass(frozen=True)
class QuadraticSchedule:
    """gamma(t) = 1 - (1 - epsilon) t^2: most tokens stay visible until late, so early steps of a sampler reveal more."""

    epsilon: float = 1e-3

    def gamma(self, t: torch.Tensor) -> torch.Tensor:
        return 1 - (1 - self.epsilon) * t**2

    def inverse(self, gamma: torch.Tensor) -> torch.Tensor:
        return ((1 - gamma) / (1 - self.epsilon)).sqrt()

    def derivative(self, t: torch.Tensor) -> torch.Tensor:
        return -2 * (1 - self.epsilon) * t


def main() -> torch.Tensor:
    NOISE_SCHEDULES["quadratic"] = QuadraticSchedule  # before a model that names it is made or loaded
    shapes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2, "max_position_embeddings": 64}
    model = MDLMForMaskedDiffusion(MDLMConfig(vocab_size=48, noise_schedule="quadratic", **shapes))
    # Training, sampling and the NELBO all take it from the configuration.
    output = model.generate(
        steps=4, num_return_sequences=50, seed=0, return_dict_in_generate=True, output_reveal_steps=True
    )
    share = output.reveal_steps.flatten().bincount(minlength=4) / output.reveal_steps.numel()
    print("share of the tokens that each of four steps reveals:", [round(x, 2) for x in share.tolist()])
    return share


if __name__ == "__main__":
    main()
