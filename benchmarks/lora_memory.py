"""The memory of a distillation with all weights and with an adapter: measured for one shape, computed for larger ones.

    python -m benchmarks.lora_memory                    # the 169M shape, one row of 256 tokens
    python -m benchmarks.lora_memory --length 16 --layers 1 --hidden_size 32 --vocab_size 48

A step is MCD's, in its second round, with teacher and EMA: loss, backward and AdamW, with activation checkpointing. What is
computed is what a step holds whatever the batch, in bytes for each of P weights and each of A of the adapter:

    all weights    24 P              weights 4, gradients 4, AdamW 8, teacher 4, EMA 4
    an adapter     b P + 24 A        b = 4, or 2 with the base in bfloat16; A = r sum over its layers of (inputs + outputs)

Each side is measured in a process of its own, from before the first network is built; `beside` is what the measured peak has
more than that: activations, a chunk of logits, what the allocator keeps. Bfloat16 is measured on a GPU only: its products take
minutes on a CPU. Writes `benchmarks/results/lora_memory.json`.
"""

import argparse
import json
import tempfile

import torch
from peft import LoraConfig
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.measuring import PeakMemory, count, in_its_own_process, synchronize, write_result
from benchmarks.workloads import build_network
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from modeling_mcd.backbones import wrap
from trainers.adapters import default_targets
from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments
from trainers.teacher import ema_weight


SIDES = ("all weights", "adapter", "adapter, base in bfloat16")


def bytes_of(side: str, weights: int, adapter: int) -> int:
    if side == "all weights":
        return 24 * weights
    return (2 if side.endswith("bfloat16") else 4) * weights + 24 * adapter


def sizes(model: torch.nn.Module, rank: int) -> tuple[int, int]:
    """The number of weights of a network, and of an adapter on its default layers."""
    targets = tuple(f".{name}" for name in default_targets(model))
    layers = [m for name, m in model.named_modules() if isinstance(m, torch.nn.Linear) and name.endswith(targets)]
    return model.num_parameters(), rank * sum(layer.in_features + layer.out_features for layer in layers)


def larger() -> dict[str, torch.nn.Module]:
    """The shapes of recipes/large.yaml and of LLaDA-8B, without weights."""
    with torch.device("meta"):
        large = MDLMConfig(vocab_size=50258, hidden_size=1536, num_hidden_layers=24, num_attention_heads=16)
        llada = LlamaConfig(
            vocab_size=126464,
            hidden_size=4096,
            intermediate_size=12288,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=32,
            tie_word_embeddings=False,
        )
        network = wrap(LlamaForCausalLM(llada), mask_token_id=126336)
        return {"large": MDLMForMaskedDiffusion(large), "LLaDA-8B": network}


def measure(side: str, options: argparse.Namespace) -> dict:
    start = 0 if torch.cuda.is_available() else PeakMemory.bytes_held()
    model = build_network(options, 0)
    counts = sizes(model, options.rank)
    if side.endswith("bfloat16"):
        model = model.bfloat16()
    adapter = None if side == "all weights" else LoraConfig(r=options.rank, lora_alpha=options.rank)
    with tempfile.TemporaryDirectory() as folder:
        settings = {"per_device_train_batch_size": options.batch_size, "save_strategy": "no", "report_to": "none"}
        arguments = MCDTrainingArguments(output_dir=folder, bf16=torch.cuda.is_available(), **settings)
        trainer = MCDTrainer(model, arguments, peft_config=adapter)
        del model
        trainer.model.to(arguments.device).train()
        trainer.model.gradient_checkpointing_enable()
        trainer.companions["teacher"].follow(trainer.model)
        x_0 = torch.randint(0, options.vocab_size - 1, (options.batch_size, options.length)).to(arguments.device)
        trained = [parameter for parameter in trainer.model.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=6e-5, fused=True)
        with PeakMemory() as peak:
            for step in range(options.steps):
                trainer.state.global_step = arguments.steps_per_round + step
                with trainer.compute_loss_context_manager():
                    loss = trainer.compute_loss(trainer.model, {"input_ids": x_0})
                loss.backward()
                optimizer.step()
                optimizer.zero_grad()
                trainer.companions["ema"].follow(trainer.model, ema_weight(0.9, step))
            synchronize()
    computed = bytes_of(side, *counts)
    return {"peak": peak.total - start, "computed": computed, "weights": counts[0], "adapter": counts[1]}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rank", type=count, default=64)
    parser.add_argument("--batch_size", type=count, default=1)
    parser.add_argument("--length", type=count, default=256)
    parser.add_argument("--layers", type=count, default=12)
    parser.add_argument("--hidden_size", type=count, default=768)
    parser.add_argument("--vocab_size", type=count, default=50258)
    parser.add_argument("--steps", type=count, default=2, help="the first makes AdamW's state")
    parser.add_argument("--measure", choices=SIDES, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    shape = {name: value for name, value in vars(options).items() if name != "measure"}
    words = [word for name, value in shape.items() for word in (f"--{name}", str(value))]
    networks = larger()
    head = [
        "GB",
        "measured",
        "computed",
        "beside",
        *(f"{n}, {m.num_parameters() / 1e9:.2f}B" for n, m in networks.items()),
    ]
    print(" | ".join(head))
    measured, computed = {}, {}
    for side in SIDES:
        if torch.cuda.is_available() or not side.endswith("bfloat16"):
            row = measured[side] = in_its_own_process("benchmarks.lora_memory", *words, "--measure", side)
        at_hand = bytes_of(side, row["weights"], row["adapter"])
        computed[side] = {name: bytes_of(side, *sizes(network, options.rank)) for name, network in networks.items()}
        peak = measured.get(side, {}).get("peak", float("nan"))
        cells = [f"{x / 1e9:.2f}" for x in (peak, at_hand, peak - at_hand)]
        print(" | ".join([side, *cells, *(f"{x / 1e9:.1f}" for x in computed[side].values())]), flush=True)
    write_result("lora_memory", {"settings": shape, "measured": measured, "computed": computed})


if __name__ == "__main__":
    main()
