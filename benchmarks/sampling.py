"""`generate` against the full-canvas ancestral sampler as published, and against the bare trunk: time and memory.

    python -m benchmarks.sampling                                      # the 169M shape on this machine, B = 1
    python -m benchmarks.sampling --batch 1 16 64 --dtype bfloat16     # on a GPU
    python -m benchmarks.sampling --locking spread interleaved         # locked reveals beside independent ones
    python -m benchmarks.sampling --memory                             # peak memory against length and vocabulary
    python -m benchmarks.sampling --hidden_size 64 --layers 2 --vocab 1000 --length 64 --steps 4 16    # seconds

The plain side is MDLM's update (arXiv 2406.07524, Alg. 2) in every step on every position: forward, softmax and Gumbel
noise over the vocabulary, in float64 or as the original code does it, in float32 with truncated noise. Both sides have the
same random weights and run alternately in one process, in the order ABBA. So does the trunk alone, the floor under every sampler that makes N
forwards. The cost of a plain step and of a trunk forward is constant, so both are timed over at most `--plain_steps` of
the N and scaled; `generate` is always timed in full. Medians of `--repeats` runs, after one that warms up.

Prints ratios and writes `benchmarks/results/sampling.json` (`--memory`: `sampling_memory.json`).
"""

import argparse
import functools
import json
import resource
import statistics
import time

import torch

from benchmarks.measuring import count, in_its_own_process, synchronize, write_result
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from modeling_mcd.locking_mdlm import LOCKINGS
from modeling_mcd.noise_schedule_mdlm import noise_schedule_of


@torch.no_grad()
def full_canvas(model: MDLMForMaskedDiffusion, batch: int, length: int, steps: int, timed: int, precision: str):
    """The first `timed` of `steps` steps."""
    mask = model.config.mask_token_id
    canvas = torch.full((batch, length), mask, device=model.device)
    gamma = noise_schedule_of(model.config).gamma(torch.linspace(1, 0, steps + 1, dtype=torch.float64)).tolist()
    for step in range(timed):
        logits = model(input_ids=canvas).logits
        logits = logits.double() if precision == "float64" else logits.float()
        logits[..., mask] = -torch.inf
        weights = logits.softmax(dim=-1).mul_(gamma[step + 1] - gamma[step])
        weights[..., mask] = 1 - gamma[step + 1]
        noise = torch.rand_like(weights).add_(1e-10).log_().neg_().add_(1e-10)
        canvas = torch.where(canvas == mask, weights.div_(noise).argmax(dim=-1), canvas)
    return canvas


@torch.no_grad()
def trunk_alone(model: MDLMForMaskedDiffusion, batch: int, length: int, timed: int):
    tokens = torch.zeros(batch, length, dtype=torch.long, device=model.device)
    for _ in range(timed):
        model.model(input_ids=tokens)


def build(options: argparse.Namespace, length: int, vocab: int) -> MDLMForMaskedDiffusion:
    torch.manual_seed(0)
    config = MDLMConfig(
        vocab_size=vocab,
        hidden_size=options.hidden_size,
        num_hidden_layers=options.layers,
        num_attention_heads=max(1, options.hidden_size // 64),
        max_position_embeddings=length,
    )
    model = MDLMForMaskedDiffusion(config).eval()
    torch.nn.init.normal_(model.lm_head.weight, std=0.02)  # a fresh head is zero, and every token equally likely
    return model.to(options.device, getattr(torch, options.dtype))


def seconds(call) -> float:
    start = time.perf_counter()
    call()
    synchronize()
    return time.perf_counter() - start


def compare(
    model: MDLMForMaskedDiffusion, options: argparse.Namespace, batch: int, steps: int, precision: str
) -> dict:
    length, timed = options.length, min(steps, options.plain_steps)
    arguments = {"steps": steps, "seed": 0, "num_return_sequences": batch, "precision": precision}
    sides = {
        "generate": (lambda: model.generate(**arguments), 1),
        "plain": (lambda: full_canvas(model, batch, length, steps, timed, precision), steps / timed),
        "trunk": (lambda: trunk_alone(model, batch, length, timed), steps / timed),
    }
    if options.compile:
        sides["compiled"] = (lambda: model.generate(**arguments, compile=True), 1)
    for locking in options.locking:
        sides[locking] = functools.partial(model.generate, **arguments, locking=locking), 1
    times, peaks = {name: [] for name in sides}, {}
    warm_up = 0 if options.no_warm_up else 1
    for repeat in range(options.repeats + warm_up):
        for name in list(sides)[:: -1 if repeat % 2 else 1]:
            call, scale = sides[name]
            if options.device != "cpu":
                torch.cuda.reset_peak_memory_stats()
            measured = seconds(call) * scale
            if options.device != "cpu":
                peaks[name] = torch.cuda.max_memory_allocated() / 1e9
            if repeat >= warm_up:
                times[name].append(measured)
    medians = {name: statistics.median(values) for name, values in times.items()}
    row = {
        "batch": batch,
        "steps": steps,
        "precision": precision,
        "speedup": medians["plain"] / medians["generate"],
        "over_trunk": medians["generate"] / medians["trunk"],
        "tokens_per_second": batch * length / medians["generate"],
        "seconds": medians,
        "plain_steps_timed": timed,
    }
    if options.compile:
        row["compile_speedup"] = medians["generate"] / medians["compiled"]
    for locking in options.locking:
        row[f"independent_over_{locking}"] = medians["generate"] / medians[locking]
    if peaks:
        row["peak_gb"] = peaks
        row["waits_for_the_device"] = waits(model, arguments)
    return row


def waits(model: MDLMForMaskedDiffusion, arguments: dict) -> str | None:
    """What made the host wait for the GPU between the first step and the last, if anything did."""
    last = arguments["steps"] - 1

    def callback(step: int, canvas: torch.Tensor):
        torch.cuda.set_sync_debug_mode("default" if step >= last else "error")

    try:
        model.generate(**arguments, callback=callback)
    except RuntimeError as error:
        return str(error)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return None


def measure_memory(options: argparse.Namespace) -> dict:
    """Peak memory of one side over that of the loaded model, in GB."""
    model = build(options, options.length, options.vocab)
    model.generate(steps=1, seed=0, length=2)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if options.measure == "plain":
        full_canvas(model, options.batch[0], options.length, 4, 1, "float64")
    else:
        model.generate(
            sampler=options.measure,
            seed=0,
            num_return_sequences=options.batch[0],
            **({} if options.measure == "first_hitting" else {"steps": 4}),
        )
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_gb": (after - before) * 1024 / 1e9}


def memory_table(options: argparse.Namespace) -> list[dict]:
    """A process for every side, length and vocabulary: peak memory is that of a process."""
    rows = []
    grid = [
        (options.length // 4, options.vocab),
        (options.length, options.vocab // 4),
        (options.length, options.vocab),
    ]
    for length, vocab in grid:
        row = {"length": length, "vocab": vocab, "all_logits_float64_gb": options.batch[0] * length * vocab * 8 / 1e9}
        for side in ("plain", "ancestral", "random", "first_hitting"):
            words = ["--measure", side, "--length", str(length), "--vocab", str(vocab)]
            words += ["--hidden_size", str(min(128, options.hidden_size)), "--layers", "1"]
            words += ["--batch", str(options.batch[0])]
            row[side] = in_its_own_process("benchmarks.sampling", *words)["peak_gb"]
        rows.append(row)
        sides = ", ".join(f"{side} {row[side]:.2f}" for side in ("plain", "ancestral", "random", "first_hitting"))
        print(
            f"L = {length}, V = {vocab}: GB above the model: {sides}; all logits in float64 {row['all_logits_float64_gb']:.2f}"
        )
    return rows


def parser() -> argparse.ArgumentParser:
    result = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    result.add_argument("--steps", type=count, nargs="+", default=[8, 16, 64, 256])
    result.add_argument("--batch", type=count, nargs="+", default=[1])
    result.add_argument("--precision", nargs="+", choices=("float64", "legacy_float32"), default=["float64"])
    result.add_argument("--length", type=count, default=1024)
    result.add_argument("--hidden_size", type=count, default=768)
    result.add_argument("--layers", type=count, default=12)
    result.add_argument("--vocab", type=count, default=50258)
    result.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    result.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    result.add_argument("--repeats", type=count, default=3)
    result.add_argument("--no_warm_up", action="store_true", help="Time the first run too: long runs on a CPU.")
    result.add_argument("--plain_steps", type=count, default=16, help="Steps of the plain side that are timed.")
    result.add_argument("--compile", action="store_true", help="Time `generate(compile=True)` too.")
    result.add_argument("--locking", nargs="*", choices=LOCKINGS[1:], default=[], help="Lockings to time too.")
    result.add_argument("--memory", action="store_true", help="Peak memory instead of time; on the CPU.")
    result.add_argument("--output", help="The result file; under benchmarks/results/ by default.")
    result.add_argument("--measure", help=argparse.SUPPRESS)
    return result


def main():
    options = parser().parse_args()
    if options.measure:
        options.device = "cpu"
        print(json.dumps(measure_memory(options)))
        return
    if options.memory:
        rows, name = memory_table(options), "sampling_memory"
    else:
        rows, name = [], "sampling"
        model = build(options, options.length, options.vocab)
        for precision in options.precision:
            for batch in options.batch:
                for steps in options.steps:
                    row = compare(model, options, batch, steps, precision)
                    rows.append(row)
                    print(
                        f"{precision}, B = {batch}, N = {steps}: {row['speedup']:.2f}x as fast as the full canvas "
                        f"({row['plain_steps_timed']} of its {steps} steps timed), "
                        f"{row['over_trunk']:.2f}x the time of {steps} trunk forwards, "
                        f"{row['tokens_per_second']:.0f} tokens/s"
                        + (f", compiled {row['compile_speedup']:.2f}x" if options.compile else "")
                        + "".join(f", {name} {row[f'independent_over_{name}']:.2f}x" for name in options.locking)
                        + (f", waits: {row['waits_for_the_device']}" if "waits_for_the_device" in row else ""),
                        flush=True,
                    )
    settings = {setting: value for setting, value in vars(options).items() if setting != "output"}
    write_result(name, {"rows": rows, "settings": settings}, options.output)


if __name__ == "__main__":
    main()
