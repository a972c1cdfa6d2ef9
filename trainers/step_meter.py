"""What a training step costs: its operations, tokens per second, MFU, peak memory, and how long it waits for data.

MFU is the part of the device's peak that the products reach without which a step cannot be. Each multiplication counts as 2
operations. A trunk with n weights in the linear layers that its text passes through, l layers of width d, on rows of L tokens, and a
head over V tokens take

    for each token, forward    m = n + 2 L d l multiplications                       n = 12 d^2 l in our own network
    for each row of the head   V d

A backward takes as much as the forward for the gradient of what came in, and once more for that of the weights, if these are
trained. So a step of MCD on B rows, with half of the tokens masked, is 2 B L (4 m + 2 V d): the student's trunk three times, the
teacher's once, and four products of the head. What activation checkpointing computes again counts nothing.
"""

import resource
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import nn
from transformers import TrainerCallback
from transformers.pytorch_utils import Conv1D

from trainers.adapters import OUR_TARGETS, is_adapted


# Dense bfloat16 peaks of data sheets, TFLOP/s, by a part of the GPU's name; the first that fits.
PEAKS = {
    "H100 PCIe": 756,
    "H100": 989,
    "H200": 989,
    "B200": 2250,
    "A100": 312,
    "L40S": 362,
    "L4": 121,
    "RTX 4090": 165,
}


def known_peak(device: torch.device) -> float | None:
    """The dense bfloat16 peak of a device by its data sheet, TFLOP/s; None if it is none of `PEAKS`."""
    if device.type != "cuda" or not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name(device)
    return next((float(peak) for part, peak in PEAKS.items() if part in name), None)


def trunk_of(model: nn.Module) -> nn.Module:
    """The module between the tokens and the hidden states that the head is given, of a network with or without an adapter."""
    base = model.get_base_model() if is_adapted(model) else model
    return base.network.base_model if hasattr(base, "network") else base.model


@dataclass(frozen=True)
class Operations:
    """The multiplications of a network's forward.

    Args:
        weights: for each token, those with the weights of the trunk's linear layers.
        width: for each token and each token that it attends to, half of those of attention: hidden size times layers.
        head: for each row of the head.
        trained: whether weights of the trunk are trained (2), only an adapter in it (1), or nothing (0).
        head_trained: whether the head's weights are.
    """

    weights: int
    width: int
    head: int
    trained: int = 2
    head_trained: bool = True

    @classmethod
    def of(cls, model: nn.Module) -> "Operations":
        """Those of a network of ours. Layers that see the noise level alone, one row for each sequence, count nothing."""
        config, trunk = getattr(model.config, "backbone_config", model.config), trunk_of(model)
        own = not hasattr(model.config, "backbone_config")
        weights, base_trained = 0, False
        for name, layer in trunk.named_modules():
            if isinstance(layer, nn.Linear | Conv1D) and (not own or set(name.split(".")) & set(OUR_TARGETS)):
                # not the number of elements, which is another one of 4 bits, and zero of a part that is elsewhere
                sizes = (
                    (layer.in_features, layer.out_features) if isinstance(layer, nn.Linear) else (layer.nx, layer.nf)
                )
                weights += sizes[0] * sizes[1]
                base_trained |= layer.weight.requires_grad and ".lora_" not in name
        head = model.get_output_embeddings()
        return cls(
            weights=weights,
            width=config.hidden_size * config.num_hidden_layers,
            head=config.vocab_size * config.hidden_size,
            trained=2 if base_trained else int(any(parameter.requires_grad for parameter in trunk.parameters())),
            head_trained=head.weight.requires_grad,
        )

    def count(self, tokens: int, length: int, rows: float, trains: bool) -> float:
        """Operations on `tokens` tokens in rows of `length`, `rows` of which go through the head.

        Args:
            trains: whether a backward follows.
        """
        trunk, head = 1, 1
        if trains:
            trunk, head = 1 + self.trained, 1 + (self.trained > 0) + self.head_trained
        return 2.0 * (trunk * tokens * (self.weights + 2 * length * self.width) + head * rows * self.head)


def peak_memory(device: torch.device) -> int:
    """The most bytes that this process has held since it started: of the GPU, or on a CPU of main memory."""
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class StepMeter(TrainerCallback):
    """Measures steps between two log lines, and all of them together. Only a log line waits for the device, which it does anyway.

    The clock runs while a step waits for its batches, and from its first forward until it has ended. Saving, evaluating and judging
    between two steps do not count.

    Args:
        device: of this process.
        peak_tflops: of one device; None: no MFU.
    """

    def __init__(self, device: torch.device, peak_tflops: float | None = None):
        self.device, self.peak = device, peak_tflops or known_peak(device)
        self.operations = 0.0  # of the steps since the last line, on this process; as `waited` and `seconds`
        self.waited = self.seconds = 0.0
        self.tokens: list[int | torch.Tensor] = []  # on the device where they are: a look would wait for it
        self.lines: list[torch.Tensor] = []
        self.begun: float | None = None
        self.ended: float | None = None

    @contextmanager
    def waiting(self):
        """A context in which the next step waits for its batches."""
        start = time.perf_counter()
        self._stop()
        yield
        waited = time.perf_counter() - start
        self.waited, self.seconds = self.waited + waited, self.seconds + waited

    def _stop(self):
        if self.begun is not None and self.ended is not None:
            self.seconds += self.ended - self.begun
        self.begun = self.ended = None

    def count(self, inputs: dict[str, torch.Tensor]):
        """Called before each forward: starts the clock, and counts the tokens that are not padding."""
        if self.begun is None:
            self.begun = time.perf_counter()
        mask = inputs.get("attention_mask")
        self.tokens.append(inputs["input_ids"].numel() if mask is None else mask.sum())

    def on_step_end(self, args, state, control, **kwargs):
        if control.should_log and self.device.type == "cuda":
            torch.cuda.synchronize(self.device)  # or the line would not count what the device has still to do
        self.ended = time.perf_counter()

    def line(self, gather) -> dict[str, float]:
        """The figures of all processes since the last line. Called in every process.

        Args:
            gather: `Accelerator.gather`.
        """
        self._stop()
        tokens = float(sum(int(number) for number in self.tokens))
        own = [tokens, self.seconds, self.waited, self.operations, peak_memory(self.device)]
        self.tokens, self.seconds, self.waited, self.operations = [], 0.0, 0.0, 0.0
        everyone = gather(torch.tensor([own], dtype=torch.float64, device=self.device)).cpu()
        self.lines.append(everyone)
        return self.figures([everyone])

    def figures(self, lines: list[torch.Tensor]) -> dict[str, float]:
        tokens, seconds, waited, operations, _ = torch.stack(lines).sum(dim=0).T
        longest = seconds.max().item()
        if longest == 0:
            return {}
        figures = {
            "tokens_per_second": tokens.sum().item() / longest,
            "data_wait": (waited.sum() / seconds.sum()).item(),
        }
        figures["peak_memory_gb"] = torch.stack(lines)[..., -1].max().item() / 1e9
        if self.peak is not None:
            figures["mfu"] = operations.mean().item() / longest / (self.peak * 1e12)
        return figures

    def total(self) -> dict | None:
        """The figures of all steps of this process but those before its first log line; None if there were no steps.

        The first steps compile and allocate. A run of one line has no others.
        """
        lines = self.lines[1:] or self.lines
        figures = self.figures(lines) if lines else {}
        if not figures:
            return None
        processes, on_gpu = len(lines[0]), self.device.type == "cuda" and torch.cuda.is_available()
        device = torch.cuda.get_device_name(self.device) if on_gpu else self.device.type
        return {**figures, "device": device, "processes": processes}
