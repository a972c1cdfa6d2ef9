"""Student-first KL from hidden rows in chunks, against the plain formula on whole logits: time and peak memory.

    python benchmarks/divergence.py [--rows 4096] [--hidden_size 768] [--vocab_size 50258] [--kind student_teacher]

Forward and backward, float32, teacher at temperature 0.9, gradients of the student's hidden rows and head. Every measurement
is a process of its own, alternating; the first call warms up and the second is timed. Memory is the peak of a call above
what the process held before it (its inputs and, in both, the libraries' buffers), sampled from a thread of its own. Both
sides must give the same loss and the same gradients. Prints the ratios of the medians and writes
`benchmarks/results/divergence.json`.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from trainers.divergences import HeadRows, divergence


TEMPERATURE = 0.9


def plain_divergence(kind: str, student: HeadRows, teacher: HeadRows, temperature: float) -> torch.Tensor:
    """The formula as it is usually written: whole logits, [MASK] removed, log-softmax, and autograd for the rest."""

    def log_probabilities(rows: HeadRows, temperature: float) -> torch.Tensor:
        logits = torch.nn.functional.linear(rows.hidden, rows.weight, rows.bias).float() / temperature
        is_mask = torch.arange(logits.shape[-1], device=logits.device) == rows.mask_token_id
        return logits.masked_fill(is_mask, -1e6).log_softmax(dim=-1)

    log_p = log_probabilities(student, 1.0)
    with torch.no_grad():
        log_q = log_probabilities(teacher, temperature)
    if kind == "teacher_student":
        log_p, log_q = log_q, log_p
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


class PeakMemory:
    """Bytes above the start that the process (the GPU, if there is one) held at most, while the context was open."""

    def __enter__(self):
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
            self.start = torch.cuda.memory_allocated()
            return self
        self.start = self.bytes_held()
        self.highest, self.open = self.start, True
        self.thread = threading.Thread(target=self.watch)
        self.thread.start()
        return self

    def watch(self):
        while self.open:
            self.highest = max(self.highest, self.bytes_held())
            time.sleep(0.002)

    @staticmethod
    def bytes_held() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def __exit__(self, *error):
        if torch.cuda.is_available():
            self.bytes = torch.cuda.max_memory_allocated() - self.start
            return
        self.open = False
        self.thread.join()
        self.bytes = self.highest - self.start


def synchronize():
    if torch.cuda.is_available():
        torch.cuda.synchronize()


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
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--hidden_size", type=int, default=768)
    parser.add_argument("--vocab_size", type=int, default=50258)
    parser.add_argument("--kind", choices=("student_teacher", "teacher_student"), default="student_teacher")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=("plain", "chunked"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return
    runs = {"plain": [], "chunked": []}
    for _ in range(options.repeats):
        for side, results in runs.items():
            words = [sys.executable, "-m", "benchmarks.divergence", *sys.argv[1:], "--measure", side]
            results.append(json.loads(subprocess.check_output(words, text=True)))
            print(f"{side:>8}: {results[-1]['seconds']:.2f} s, peak {results[-1]['peak_gb']:.2f} GB", flush=True)
    for ours, theirs in zip(runs["chunked"], runs["plain"], strict=True):
        for a, b in zip(
            [ours["loss"], *ours["gradient_norms"]], [theirs["loss"], *theirs["gradient_norms"]], strict=True
        ):
            assert abs(a - b) <= 1e-4 * abs(b), f"the two sides differ: {a} and {b}"
    medians = {
        side: {key: statistics.median(result[key] for result in results) for key in ("seconds", "peak_gb")}
        for side, results in runs.items()
    }
    ratios = {key: medians["chunked"][key] / medians["plain"][key] for key in ("seconds", "peak_gb")}
    print(f"   ratio: time {ratios['seconds']:.2f} (at most 0.8), peak memory {ratios['peak_gb']:.3f} (at most 0.1)")
    results = Path(__file__).parent / "results"
    results.mkdir(exist_ok=True)
    content = {
        "settings": {"rows": options.rows, "hidden_size": options.hidden_size, "vocab_size": options.vocab_size},
        "kind": options.kind,
        "runs": runs,
        "median": medians,
        "ratio": ratios,
        "machine": {"processor": platform.machine(), "cores": os.cpu_count(), "threads": torch.get_num_threads()},
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
    }
    if torch.cuda.is_available():
        content["machine"]["gpu"] = torch.cuda.get_device_name()
    (results / "divergence.json").write_text(json.dumps(content, indent=2) + "\n")


if __name__ == "__main__":
    main()
