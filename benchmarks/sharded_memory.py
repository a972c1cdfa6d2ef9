"""Memory of each process under DDP, ZeRO and FSDP2: measured for two processes and a small shape, computed for larger ones.

    python -m benchmarks.sharded_memory                 # a network of 26M parameters, some minutes
    python -m benchmarks.sharded_memory --modes zero3   # one of them; prints it, and writes nothing

A step is MCD's with teacher and EMA, all in float32. What is computed is what a process holds whatever the batch, for each of
P parameters divided among W processes, in bytes:

    DDP       28           weights 4, gradients 4, their buckets 4, AdamW 8, teacher 4, EMA 4
    ZeRO-1    16 + 12/W    weights 4, gradients 4, teacher 4, EMA 4;  AdamW 8/W, a copy of the weights 4/W
    ZeRO-2    12 + 16/W    the gradients 4/W too
    ZeRO-3    28/W         the weights, teacher and EMA too
    FSDP2     24/W         weights, gradients, AdamW, teacher and EMA

Each mode is measured in processes of its own, in its second and third step, from before the network is built; `beside` is what
the measured peak has more than that: activations, the layers that are complete at the moment, buffers of communication (those
of DeepSpeed are set to 1M numbers here). Writes `benchmarks/results/sharded_memory.json`.
"""

import argparse
import ctypes
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from accelerate.state import AcceleratorState, DistributedType, PartialState
from transformers import TrainerCallback

from benchmarks.lora_memory import larger
from benchmarks.measuring import PeakMemory, count, write_result
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from trainers import sharded_trainer
from trainers.mcd_trainer import MCDTrainer, MCDTrainingArguments


# Mode -> bytes for each parameter in every process, and those that the processes share.
BYTES = {"ddp": (28, 0), "zero1": (16, 12), "zero2": (12, 16), "zero3": (0, 28), "fsdp2": (0, 24)}
BUCKET = 1_000_000  # numbers in DeepSpeed's buffers


def bytes_of(mode: str, parameters: float, processes: int) -> float:
    complete, shared = BYTES[mode]
    return parameters * (complete + shared / processes)


def promote():
    """Lets accelerate shard on a CPU, where it takes DDP otherwise: its state says FSDP where it would say DDP over gloo.

    From there on everything is as on GPUs, in accelerate, transformers and this library. For tests and measurements only.
    """
    begin = AcceleratorState.__init__

    def begin_promoted(self, *arguments, fsdp_plugin=None, **kwargs):
        new = not AcceleratorState._shared_state
        begin(self, *arguments, fsdp_plugin=fsdp_plugin, **kwargs)
        if new and fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = self.distributed_type
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)

    AcceleratorState.__init__ = begin_promoted
    sharded_trainer.refuse_without_accelerator = lambda arguments: None


class _Watch(TrainerCallback):
    """The peak of all steps but the first, which makes AdamW's state."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 1:
            if not torch.cuda.is_available():
                ctypes.CDLL("libc.so.6").malloc_trim(0)
            self.peak = PeakMemory().__enter__()

    def on_train_end(self, args, state, control, **kwargs):
        self.peak.__exit__()


def measure(mode: str, options: argparse.Namespace) -> dict:
    if mode == "fsdp2" and not torch.cuda.is_available():
        promote()
    settings = {"max_steps": 3, "num_rounds": 1, "steps_per_round": 3, "per_device_train_batch_size": 1}
    settings |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "logging_strategy": "no"}
    settings |= {"fsdp": True, "fsdp_config": {"state_dict_type": "FULL_STATE_DICT"}} if mode == "fsdp2" else {}
    with tempfile.TemporaryDirectory() as folder:
        arguments = MCDTrainingArguments(output_dir=folder, **settings)
        start = 0 if torch.cuda.is_available() else PeakMemory.bytes_held()
        shape = {"hidden_size": options.hidden_size, "num_hidden_layers": options.layers, "num_attention_heads": 4}
        model = MDLMForMaskedDiffusion(MDLMConfig(vocab_size=options.vocab_size, max_position_embeddings=16, **shape))
        parameters, watch = model.num_parameters(), _Watch()
        rows = [{"input_ids": list(range(16))} for _ in range(arguments.world_size * 4)]
        trainer = MCDTrainer(model, arguments, train_dataset=rows, callbacks=[watch])
        del model
        trainer.train()
    return {"peak": watch.peak.total - start, "parameters": parameters}


def launched(mode: str, words: list[str], folder: Path) -> dict:
    """The figures of one of two processes in a mode, started by torchrun."""
    # Memory that is freed goes back at once: the allocator keeps what is below a threshold, which grows to 32 MB by itself.
    environment = os.environ | {"OMP_NUM_THREADS": "1", "MALLOC_MMAP_THRESHOLD_": "65536"}
    if mode.startswith("zero"):
        auto = (
            "train_batch_size",
            "train_micro_batch_size_per_gpu",
            "gradient_accumulation_steps",
            "gradient_clipping",
        )
        zero = {"stage": int(mode[-1]), "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET}
        zero |= {"stage3_prefetch_bucket_size": BUCKET, "stage3_max_live_parameters": BUCKET}
        config = folder / f"{mode}.json"
        config.write_text(json.dumps(dict.fromkeys(auto, "auto") | {"zero_optimization": zero}))
        environment |= {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(config)}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = folder / "result.json"
    command = [*torchrun, "-m", "benchmarks.sharded_memory", *words, "--measure", mode, "--result", str(result)]
    subprocess.run(command, env=environment, check=True)
    return json.loads(result.read_text())


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=count, default=6)
    parser.add_argument("--hidden_size", type=count, default=512)
    parser.add_argument("--vocab_size", type=count, default=4096)
    parser.add_argument("--modes", nargs="+", choices=BYTES, default=list(BYTES))
    parser.add_argument("--measure", choices=BYTES, help=argparse.SUPPRESS)
    parser.add_argument("--result", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        row = measure(options.measure, options)
        if os.environ["RANK"] == "0":
            Path(options.result).write_text(json.dumps(row))
        return
    words = ["--layers", str(options.layers), "--hidden_size", str(options.hidden_size)]
    words += ["--vocab_size", str(options.vocab_size)]
    sizes = {name: network.num_parameters() for name, network in larger().items()} | {"70B": 70e9}
    columns = [f"{name}, {processes} processes" for name in sizes for processes in (8, 64)]
    print(" | ".join(["bytes for each parameter, two processes", "measured", "computed", *columns]))
    measured, computed = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for mode in options.modes:
            row = measured[mode] = launched(mode, words, Path(folder))
            computed[mode] = {
                f"{name}, {processes} processes": bytes_of(mode, size, processes)
                for name, size in sizes.items()
                for processes in (8, 64)
            }
            each = [row["peak"] / row["parameters"], bytes_of(mode, 1, 2)]
            cells = [f"{value:.1f}" for value in each] + [f"{x / 1e9:.1f} GB" for x in computed[mode].values()]
            print(" | ".join([mode, *cells]), flush=True)
    if set(options.modes) == set(BYTES):
        write_result("sharded_memory", {"options": vars(options), "measured": measured, "computed": computed})


if __name__ == "__main__":
    main()
