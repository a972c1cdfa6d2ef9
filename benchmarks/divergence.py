"""Student-first KL from hidden rows in chunks, against the plain formula on whole logits: time and peak memory.

    python -m benchmarks.divergence [--rows 4096] [--hidden_size 768] [--vocab_size 50258] [--kind student_first]

Forward and backward, float32, teacher at temperature 0.9, gradients of the student's hidden rows and head. Every measurement
is a process of its own, alternating; the first call warms up and the second is timed. Memory is the peak of a call above
what the process held before it (its inputs and, in both, the libraries' buffers), sampled from a thread of its own. Both
sides must give the same loss and the same gradients. Prints the ratios of the medians and writes
`benchmarks/results/divergence.json`.
"""

import argparse
import json
import sys
import time

import torch

from benchmarks.measuring import PeakMemory, alternate, count, in_its_own_process, medians, synchronize, write_result
from modeling_mcd.head_mdlm import HeadRows
from trainers.divergences import divergence


TEMPERATURE = 0.9


def plain_divergence(kind: str, student: HeadRows, teacher: HeadRows, temperature: float) -> torch.Tensor:
    """The formula as it is usually written: whole logits, [MASK] removed, log-softmax, and autograd for the rest."""

    def log_probabilities(rows: HeadRows, temperature: float) -> torch.Tensor:
        logits = torch.nn.functional.linear(rows.hidden, rows.weight, rows.bias).float()
        logits = logits if temperature == 1 else logits / temperature
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == rows.mask_token_id
        return logits.masked_fill(is_mask, -1e6).log_softmax(dim=-1)

    log_p = log_probabilities(student, 1.0)
    with torch.no_grad():
        log_q = log_probabilities(teacher, temperature)
    if kind == "teacher_first":
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def measure(side: str, options: argparse.Namespace) -> dict:
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def rows(learned: bool) -> HeadRows:
        shapes = (options.rows, options.hidden_size), (options.vocab_size, options.hidden_size), (options.vocab_size,)
        tensors = (torch.randn(shape, generator=generator) for shape in shapes)
        scaled = (tensor * scale for tensor, scale in zip(tensors, (1.0, options.hidden_size**-0.5, 0.1), strict=True))
        return HeadRows(*(t.to(device).requires_grad_(learned) for t in scaled), options.vocab_size - 1)

    student, teacher = rows(True), rows(False)
    compute = {"plain": plain_divergence, "chunked": divergence}[side]

    def step() -> float:
        loss = compute(options.kind, student, teacher, TEMPERATURE).sum() / options.rows
        loss.backward()
        synchronize()
        return loss.item()

    step()
    for tensor in (student.hidden, student.weight, student.bias):
        tensor.grad = None
    with PeakMemory() as peak:
        start = time.perf_counter()
        loss = step()
        seconds = time.perf_counter() - start
    gradients = [t.grad.double().norm().item() for t in (student.hidden, student.weight, student.bias)]
    return {"seconds": seconds, "peak_gb": peak.bytes / 1e9, "loss": loss, "gradient_norms": gradients}


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=count, default=4096)
    parser.add_argument("--hidden_size", type=count, default=768)
    parser.add_argument("--vocab_size", type=count, default=50258)
    parser.add_argument("--kind", choices=("student_first", "teacher_first"), default="student_first")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--measure", choices=("plain", "chunked"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return

    def run(side: str) -> dict:
        result = in_its_own_process("benchmarks.divergence", *sys.argv[1:], "--measure", side)
        print(f"{side:>8}: {result['seconds']:.2f} s, peak {result['peak_gb']:.2f} GB", flush=True)
        return result

    runs = alternate(("plain", "chunked"), options.repeats, run)
    for ours, theirs in zip(runs["chunked"], runs["plain"], strict=True):
        for a, b in zip(
            [ours["loss"], *ours["gradient_norms"]], [theirs["loss"], *theirs["gradient_norms"]], strict=True
        ):
            assert abs(a - b) <= 1e-4 * abs(b), f"the two sides differ: {a} and {b}"
    median = medians(runs, "seconds", "peak_gb")
    ratios = {key: median["chunked"][key] / median["plain"][key] for key in ("seconds", "peak_gb")}
    print(f"   ratio: time {ratios['seconds']:.2f} (at most 0.8), peak memory {ratios['peak_gb']:.3f} (at most 0.1)")
    settings = {name: value for name, value in vars(options).items() if name != "measure"}
    write_result("divergence", {"settings": settings, "runs": runs, "median": median, "ratio": ratios})


if __name__ == "__main__":
    main()
