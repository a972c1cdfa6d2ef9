"""Own divergence: its value in each row and its gradient, and a method that is given it by name.

python examples/own_divergence.py [TEACHER]
"""

import sys
from dataclasses import dataclass
from typing import Literal

import torch
from datasets import Dataset

from modeling_mcd.loading import load_model
from trainers import MCDTrainer, MCDTrainingArguments
from trainers.divergences import DIVERGENCES


def hellinger(log_p: torch.Tensor, log_q: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """1 - sum sqrt(p q) of each row [n], and its gradient by the student's logits [n, V], p being their softmax."""
    root = ((log_p + log_q) / 2).exp()
    overlap = root.sum(dim=-1)
    return 1 - overlap, (log_p.exp() * overlap[:, None] - root) / 2


@dataclass
class HellingerArguments(MCDTrainingArguments):
    divergence: Literal["hellinger"] = "hellinger"


def main(source: str = "recipes/tiny/teacher", steps: int = 4) -> MCDTrainer:
    DIVERGENCES["hellinger"] = hellinger
    teacher = load_model(source)
    # Data of the teacher's own: nothing is needed but the model.
    dataset = Dataset.from_dict({"input_ids": teacher.generate(num_return_sequences=8, steps=16, seed=0).tolist()})
    arguments = HellingerArguments(
        "runs/own_divergence", num_rounds=1, steps_per_round=steps, delta=0.125, per_device_train_batch_size=4,
        bf16=False, save_strategy="no", report_to="none", logging_steps=1,
    )  # fmt: skip
    trainer = MCDTrainer(load_model(source), arguments, teacher=teacher, train_dataset=dataset)
    trainer.train()
    return trainer


if __name__ == "__main__":
    main(*sys.argv[1:])
