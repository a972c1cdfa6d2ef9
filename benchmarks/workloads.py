"""The two workloads that `before_after` times in two states of the code: sampling, and one step of distillation.

This file runs as a script in a process whose PYTHONPATH is the tree to be timed, so it imports nothing of `benchmarks` and
uses only what is public and the same in both trees. It reads a line from standard input for each call to be timed, and
answers with a line of JSON: seconds, and a value by which the results of both trees can be compared.
"""

import argparse
import hashlib
import json
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

import modeling_mcd
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion


def build_network(options: argparse.Namespace, seed: int) -> MDLMForMaskedDiffusion:
    torch.manual_seed(seed)
    config = MDLMConfig(
        vocab_size=options.vocab_size,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden_size // 64),
        max_position_embeddings=options.length,
        hidden_dropout=0.0,
    )
    model = MDLMForMaskedDiffusion(config)
    for parameter in model.parameters():
        parameter.data.add_(0.02 * torch.randn_like(parameter))
    return model


def build_trainer(
    options: argparse.Namespace, folder: str, student: MDLMForMaskedDiffusion, teacher: MDLMForMaskedDiffusion
):
    """An MCD trainer on its device (bf16 autocast on a GPU), and a batch of random tokens."""
    from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments

    arguments = MCDTrainingArguments(
        output_dir=folder,
        per_device_train_batch_size=options.batch_size,
        ema_decay=None,
        save_strategy="no",
        report_to="none",
        bf16=torch.cuda.is_available(),
    )
    trainer = MCDTrainer(student, arguments, teacher=teacher)
    trainer.model.to(arguments.device).train()
    generator = torch.Generator().manual_seed(1)
    x_0 = torch.randint(0, options.vocab_size - 1, (options.batch_size, options.length), generator=generator)
    return trainer, x_0.to(arguments.device)


def sampling(options: argparse.Namespace, folder: str) -> Callable[[], str]:
    """`generate` with the ancestral sampler; the value is a digest of the tokens."""
    model = build_network(options, 0).eval().to(options.device)

    def call() -> str:
        tokens = model.generate(steps=options.steps, seed=0, num_return_sequences=options.batch_size)
        return hashlib.sha256(tokens.cpu().numpy().tobytes()).hexdigest()[:16]

    return call


def step(options: argparse.Namespace, folder: str) -> Callable[[], float]:
    """A step of MCD: loss, backward and AdamW; the value is the loss."""
    trainer, x_0 = build_trainer(options, folder, build_network(options, 0), build_network(options, 1))
    model, steps_done = trainer.model, 0
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, fused=True)

    def call() -> float:
        nonlocal steps_done
        trainer.state.global_step, steps_done = steps_done, steps_done + 1
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, {"input_ids": x_0})
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return call


WORKLOADS = {"sampling": sampling, "step": step}
SHAPE = {"batch_size": 1, "length": 128, "layers": 12, "hidden_size": 768, "vocab_size": 50258, "steps": 16}


def add_shape(parser: argparse.ArgumentParser):
    """The options of the shape; by default that of the 169M networks on a short canvas: seconds on two cores."""
    for name, value in SHAPE.items():
        help_of = {"steps": "of sampling", "batch_size": "rows"}.get(name)
        parser.add_argument(f"--{name}", type=int, default=value, help=help_of)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workload", choices=WORKLOADS)
    parser.add_argument("--tree", type=Path, required=True)
    add_shape(parser)
    options = parser.parse_args()
    options.device = "cuda" if torch.cuda.is_available() else "cpu"
    loaded = Path(modeling_mcd.__file__).resolve().parent.parent
    if loaded != options.tree.resolve():
        raise SystemExit(f"modeling_mcd was loaded from {loaded}, not from {options.tree}")
    with tempfile.TemporaryDirectory() as folder:
        call = WORKLOADS[options.workload](options, folder)
        for _ in sys.stdin:
            start = time.perf_counter()
            value = call()
            if options.device == "cuda":
                torch.cuda.synchronize()
            print(json.dumps({"seconds": time.perf_counter() - start, "value": value}), flush=True)


if __name__ == "__main__":
    main()
