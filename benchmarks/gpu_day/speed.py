"""Stage `speed`: sampling and a step of distillation at the 169M shape against what they are measured by, and two profiles."""

import math
import tempfile
import time
from argparse import Namespace
from functools import partial

import torch

from benchmarks import distillation_step, divergence, sampling
from benchmarks.gpu_day.stage import Day, Goal, Piece, Stage, free_memory
from benchmarks.measuring import synchronize
from trainers.step_meter import known_peak


KERNELS = 10


def ceilings(day: Day) -> dict:
    """What the card really does: a large matrix product in bf16 on random numbers, and a copy, bytes read and written."""
    size = 256 if day.small else 8192
    a, b = (torch.randn(size, size, device=day.device, dtype=torch.bfloat16) for _ in range(2))
    source = torch.randn(size * size, device=day.device)
    target = torch.empty_like(source)

    def seconds(call, repeats: int = 10) -> float:
        for _ in range(3):
            call()
        synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        synchronize()
        return (time.perf_counter() - start) / repeats

    tflops = 2 * size**3 / seconds(lambda: a @ b) / 1e12
    gbytes = 2 * source.nbytes / seconds(lambda: target.copy_(source)) / 1e9
    peak = known_peak(torch.device(day.device)) or tflops  # of a card that is not known, by its matrix product alone
    return {"matmul_tflops": tflops, "copy_gb_per_second": gbytes, "peak_tflops": peak}


def shape(day: Day) -> Namespace:
    if day.small:
        return Namespace(
            hidden_size=64,
            layers=2,
            length=64,
            vocab_size=512,
            rows=64,
            batches=[1, 2],
            steps=[4, 8],
            batch_size=2,
            compiled=[1],
        )
    sizes = {"hidden_size": 768, "layers": 12, "length": 1024, "vocab_size": 50258, "rows": 16384}
    return Namespace(**sizes, batches=[1, 8, 32], steps=[8, 16, 64], compiled=[1, 8, 32], batch_size=16)


def sampling_options(day: Day, compile: bool) -> Namespace:
    size = shape(day)
    return Namespace(
        hidden_size=size.hidden_size,
        layers=size.layers,
        length=size.length,
        dtype="bfloat16",
        device=day.device,
        plain_steps=2 if day.small else 8,
        repeats=1 if day.small else 3,
        no_warm_up=False,
        compile=compile,
        locking=[] if compile else ["spread"],
    )


def sample(day: Day, batch: int, compile: bool) -> dict:
    """Rows for every N: `generate` against the published full canvas and the bare trunk, in one run."""
    options = sampling_options(day, compile)
    model, rows = sampling.build(options, options.length, shape(day).vocab_size), []
    for steps in shape(day).steps:
        for precision in ("float64",) if compile else ("float64", "float32"):
            day.check_time()
            row = sampling.compare(model, options, batch, steps, precision)
            rows.append(row)
            compiled = f", compiled {row['compile_speedup']:.2f} times faster" if compile else ""
            day.say(
                f"B = {batch}, N = {steps}, {precision}: {row['speedup']:.2f} times the full canvas, "
                f"{row['over_trunk']:.2f} of the trunk{compiled}, {row['tokens_per_second']:.0f} tokens/s"
            )
            if row.get("waits_for_the_device"):
                day.say(f"generate waits for the device: {row['waits_for_the_device']}")
    return {"rows": rows}


def step_options(day: Day) -> Namespace:
    size = shape(day)
    steps = {"warmup": 1, "steps": 1} if day.small else {"warmup": 3, "steps": 10}
    names = ("hidden_size", "layers", "length", "vocab_size", "batch_size")
    return Namespace(**{name: getattr(size, name) for name in names}, **steps)


def distil(day: Day, side: str) -> dict:
    """A step of MCD: seconds, tokens per second, peak memory, MFU.

    MFU counts what `trainers/step_meter.py` says.
    """
    options = step_options(day)
    result = distillation_step.measure(side, options)
    result["tokens_per_second"] = options.batch_size * options.length / result["seconds"]
    result["tflops"] = distillation_step.operations(options) / result["seconds"] / 1e12
    return result


def divergences(day: Day) -> dict:
    size = shape(day)
    options = Namespace(rows=size.rows, hidden_size=size.hidden_size, vocab_size=size.vocab_size, kind="student_first")
    results = {}
    for side in ("plain", "chunked"):
        results[side] = divergence.measure(side, options)
        free_memory()
    ratio = {name: results["chunked"][name] / max(results["plain"][name], 1e-9) for name in ("seconds", "peak_gb")}
    return {**results, "time_over_plain": ratio["seconds"], "memory_over_plain": ratio["peak_gb"]}


def profile(day: Day, call) -> dict:
    """The kernels that take most of the time, and the share of the time in which the GPU had none (only on a GPU)."""
    call()
    synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU]
    activities += [torch.profiler.ProfilerActivity.CUDA] if day.device == "cuda" else []
    start = time.perf_counter()
    with torch.profiler.profile(activities=activities) as profiler:
        call()
        synchronize()
    wall = time.perf_counter() - start
    on_gpu = day.device == "cuda"

    def own(event) -> float:  # microseconds
        return event.self_device_time_total if on_gpu else event.self_cpu_time_total

    # On a GPU the operators have the time of their kernels too: only the kernels themselves are counted.
    events = [e for e in profiler.key_averages() if not on_gpu or e.device_type == torch.autograd.DeviceType.CUDA]
    events, busy = sorted(events, key=own, reverse=True), sum(map(own, events))
    table = [
        {"kernel": e.key[:120], "calls": e.count, "milliseconds": own(e) / 1e3, "share": own(e) / max(busy, 1e-9)}
        for e in events[:KERNELS]
    ]
    for row in table:
        day.say(f"{row['share']:6.1%} {row['milliseconds']:9.2f} ms {row['calls']:6d} x {row['kernel'][:80]}")
    idle = idle_share(profiler) if on_gpu else None
    return {"kernels": table, "busy_seconds": busy / 1e6, "wall_seconds": wall, "idle_share": idle}


def idle_share(profiler) -> float:
    """Of the time from the first kernel's start to the last one's end: the part in which none ran."""
    spans = sorted(
        (event.time_range.start, event.time_range.end)
        for event in profiler.events()
        if event.device_type == torch.autograd.DeviceType.CUDA
    )
    if not spans:
        return math.nan
    busy, end = 0.0, spans[0][0]
    for start, stop in spans:
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return 1 - busy / max(end - spans[0][0], 1e-9)


def profile_sampling(day: Day) -> dict:
    options, size = sampling_options(day, False), shape(day)
    model = sampling.build(options, options.length, size.vocab_size)
    batch = size.batches[1]
    return profile(day, lambda: model.generate(steps=size.steps[1], seed=0, num_return_sequences=batch))


def profile_step(day: Day) -> dict:
    options = step_options(day)
    with tempfile.TemporaryDirectory() as folder:
        networks = (distillation_step.build_with_head(options, seed) for seed in (0, 1))
        trainer, blocks = distillation_step.build_trainer(options, folder, *networks)
        step, _ = distillation_step.make_step(trainer, blocks, "ours, nothing recomputed")
        return profile(day, step)


def goals(day: Day, figures: dict) -> list[Goal]:
    rows = [row for name, piece in figures.items() if name.startswith("sampling") for row in piece["rows"]]
    rows = [row for row in rows if row["precision"] == "float64"]
    step = {side: figures.get(f"step: {side}") for side in distillation_step.SIDES}
    plain, ours, lean, floor = step.values()
    peak = figures.get("ceilings", {}).get("peak_tflops")
    fastest = min((s for s in (ours, lean) if s), key=lambda s: s["seconds"], default=None)

    def over(one: dict | None, other: dict | None, name: str) -> float | None:
        return one and other and one[name] / other[name]

    compiled = [row["over_trunk"] / row["compile_speedup"] for row in rows if "compile_speedup" in row]
    return [
        Goal(
            "sampling, times as fast as the full canvas, the least of all rows",
            5,
            min((r["speedup"] for r in rows), default=None),
        ),
        Goal(
            "sampling over N trunk forwards, the most of all rows",
            1.15,
            max((r["over_trunk"] for r in rows), default=None),
            most=True,
        ),
        Goal("compiled sampling over N eager trunk forwards, the most", 1.15, max(compiled, default=None), most=True),
        Goal("MFU of a step", 0.5, fastest and peak and fastest["tflops"] / peak),
        Goal("step over its floor, nothing recomputed", 1.2, over(lean, floor, "seconds"), most=True),
        Goal("peak memory of a step over the plain one", 0.6, over(ours, plain, "peak_gb"), most=True),
    ]


def stage(day: Day) -> Stage:
    size = shape(day)
    pieces = [Piece("ceilings", 0.2, partial(ceilings, day))]
    pieces += [Piece(f"sampling, B = {b}", 0.2 + b / 60, partial(sample, day, b, False)) for b in size.batches]
    pieces += [Piece(f"step: {side}", 0.4, partial(distil, day, side)) for side in distillation_step.SIDES]
    pieces += [Piece("divergence", 0.2, partial(divergences, day))]
    pieces += [Piece("profile of sampling", 0.3, partial(profile_sampling, day))]
    pieces += [Piece("profile of a step", 0.4, partial(profile_step, day))]
    pieces += [Piece(f"sampling, compiled, B = {b}", 1, partial(sample, day, b, True)) for b in size.compiled]
    return Stage(day, "speed", pieces, partial(goals, day), "python -m benchmarks.gpu_day teacher")
