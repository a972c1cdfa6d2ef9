"""From the CPU, where noise and masks are made, to the device of the network."""

import torch


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """The tensor on `device`; the host goes on at once.

    CUDA copies ordinary memory only when it has done everything that it was given before, and the host waits meanwhile. It
    copies pinned memory in its turn. The memory is not used again before the copy is made: torch keeps account of it.
    """
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
