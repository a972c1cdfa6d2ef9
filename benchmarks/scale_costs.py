"""What large runs cost, on paper: FLOPs, GPU-hours and bytes over the wire, from the shapes of networks and recipes.

    python -m benchmarks.scale_costs [--peak_tflops 989] [--mfu 0.35]

A forward of the trunk takes, for each token, 2 n + 4 L d l FLOPs: n weights in its l layers, width d, rows of L tokens. A product with
the head takes 2 V d for each position that the loss looks at, half of them on average. A step is then

    MCD, all weights    3 forwards (backward counts two), 1 of the teacher;  4 products with the head
    MCD, an adapter     2 forwards (no gradient of frozen weights), 1 of the teacher;  3 products with the head

and one forward more where activations are recomputed. Bytes are what each process sends in a step of one micro-batch, with rings
over many processes: for each parameter

    DDP            8      gradients, reduced and spread, in float32
    ZeRO-1, -2     8      gradients reduced, weights spread
    ZeRO-3        16      weights gathered forward and backward, and once for the EMA, gradients reduced, in float32
    FSDP2, bf16   10      weights gathered forward and backward, the teacher's once, in bfloat16, gradients reduced in float32

With an adapter DDP sends 8 for each of its numbers alone, FSDP2 6 for each parameter. Under FSDP2 following (EMA, snapshots) sends
nothing. The peak is that of dense bfloat16 products; the MFU is an assumption until a GPU has run it.
"""

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from benchmarks.lora_memory import larger, sizes
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from trainers.adapters import default_targets


SENT = {"DDP": 8, "ZeRO-1, ZeRO-2": 8, "ZeRO-3": 16, "FSDP2, bf16": 10}
SENT_WITH_ADAPTER = {"DDP": (0, 8), "FSDP2, bf16": (6, 4)}  # for each parameter, for each number of the adapter


@dataclass
class Job:
    """A run: its network, the tokens that it trains on, and what a step does.

    Args:
        rank: of the adapter; 0: all weights are trained.
        recomputed: whether activations are.
    """

    network: nn.Module
    steps: int
    rows: int
    length: int
    rank: int = 0
    recomputed: bool = False

    def flops(self) -> float:
        """Of one token."""
        config = getattr(self.network.config, "backbone_config", self.network.config)
        names = tuple(f".{name}" for name in default_targets(self.network))
        layers = [m for name, m in self.network.named_modules() if isinstance(m, nn.Linear) and name.endswith(names)]
        weights = sum(layer.weight.numel() for layer in layers)
        forward = 2 * weights + 4 * self.length * config.hidden_size * config.num_hidden_layers
        head = 2 * config.vocab_size * config.hidden_size / 2
        forwards, products = (3, 3) if self.rank else (4, 4)
        return (forwards + self.recomputed) * forward + products * head

    def tokens(self) -> int:
        return self.steps * self.rows * self.length

    def sent(self) -> dict[str, float]:
        """Mode -> bytes that each process sends in a step of one micro-batch."""
        if not self.rank:
            return {mode: each * self.network.num_parameters() for mode, each in SENT.items()}
        parameters, adapter = sizes(self.network, self.rank)
        return {mode: base * parameters + own * adapter for mode, (base, own) in SENT_WITH_ADAPTER.items()}


def jobs() -> dict[str, Job]:
    networks = larger()
    with torch.device("meta"):
        small = MDLMForMaskedDiffusion(
            MDLMConfig(vocab_size=50258, hidden_size=768, num_hidden_layers=12, num_attention_heads=12)
        )
    return {
        "Table 1: MCD of the 169M model (small.yaml)": Job(small, 50_000, 128, 1024),
        "Table 3: MCD of the 863M model (large.yaml)": Job(networks["large"], 50_000, 128, 1024, recomputed=True),
        "LLaDA-8B by LoRA (llada_mcd_lora.yaml)": Job(networks["LLaDA-8B"], 1050, 64, 512, rank=128, recomputed=True),
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="an H100's, in bfloat16")
    parser.add_argument("--mfu", type=float, default=0.35, help="the part of it that a run is assumed to reach")
    options = parser.parse_args()
    print("run | tokens | GFLOP a token | FLOPs | GPU-hours | GB that a process sends in a step")
    for name, job in jobs().items():
        flops = job.flops() * job.tokens()
        hours = flops / (options.peak_tflops * 1e12 * options.mfu) / 3600
        sent = ", ".join(f"{mode} {size / 1e9:.1f}" for mode, size in job.sent().items())
        print(f"{name} | {job.tokens():.2g} | {job.flops() / 1e9:.2f} | {flops:.2g} | {hours:.1f} | {sent}")


if __name__ == "__main__":
    main()
