"""What large runs cost, on paper: FLOPs, GPU-hours and bytes over the wire, from the shapes of networks and recipes.

    python -m benchmarks.scale_costs [--peak_tflops 989] [--mfu 0.35]

FLOPs are counted as `trainers/step_meter.py` says, with half of the tokens masked. A step is then

    MCD, all weights    3 forwards (backward counts two), 1 of the teacher;  4 products with the head
    MCD, an adapter     2 forwards (no gradient of frozen weights), 1 of the teacher;  3 products with the head

and one forward more where activations are recomputed. Bytes are what each process sends in a step of one micro-batch, with rings
over many processes: for each parameter

    DDP            8      gradients, reduced and spread, in float32
    ZeRO-1, -2     8      gradients reduced, weights spread
    ZeRO-3        16      weights gathered forward and backward, the teacher's once, gradients reduced, in float32
    FSDP2, bf16   10      weights gathered forward and backward, the teacher's once, in bfloat16, gradients reduced in float32

With an adapter DDP sends 8 for each of its numbers alone, FSDP2 6 for each parameter. Following (EMA, snapshots) sends
nothing. The peak is that of dense bfloat16 products; the MFU is an assumption until a GPU has run it.
"""

import argparse
from dataclasses import dataclass, replace

import torch
from torch import nn

from benchmarks.lora_memory import larger, sizes
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from trainers.step_meter import Operations


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
        operations = Operations.of(self.network)
        if self.rank:
            operations = replace(operations, trained=1, head_trained=False)
        flops = sum(operations.count(1, self.length, 0.5, trains) for trains in (True, False))
        return flops + self.recomputed * operations.count(1, self.length, 0, trains=False)

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
