"""A whole step of MCD against one that builds full logits for both networks, and against its floor: time and memory.

    python -m benchmarks.distillation_step                      # the 169M shape, the largest batch that the plain step fits
    python -m benchmarks.distillation_step --compile            # our sides with `torch_compile`, too
    python -m benchmarks.distillation_step --batch_size 1 --length 128 --layers 2 --hidden_size 64 --vocab_size 1000

The step is loss, backward and AdamW. The plain side makes [B, L, V] logits for student and teacher and applies SUBS to all of
them, as the code of MDLM, SDTT and Duo does; both have the same weights, the same noise and activation checkpointing, and
must give the same loss. The floor is what no distillation can do without, timed alone: three student trunks (a forward and
a backward), one teacher trunk, and the head's products on the masked rows: two for the student's forward and the teacher's,
two for the gradients. Checkpointing runs the student's trunk a fourth time, so ours is timed without it, too. With `--compile` both
are timed once more with compiled trunks, against the same plain step and the same floor, which are not compiled.

Every measurement is a process of its own, alternating; its first steps warm up. Memory is the peak of the whole process (of
the GPU, if there is one, where the step runs under bf16 autocast; on a CPU in float32). Prints the ratios of the medians
and writes `benchmarks/results/distillation_step.json`, with `--compile` `distillation_step_compiled.json`.
"""

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Callable

import torch

from benchmarks.measuring import (
    PeakMemory,
    alternate,
    count,
    in_its_own_process,
    memory_available,
    synchronize,
    write_result,
)
from benchmarks.workloads import build_network, build_trainer
from modeling_mcd import MDLMForMaskedDiffusion
from modeling_mcd.forward_process_mdlm import sigma_of
from trainers.compilation import compile_trunk
from trainers.mcd_trainer import MCDTrainer
from trainers.step_meter import Operations


SIDES = ("plain", "ours", "ours, nothing recomputed", "floor")
COMPILED = ("ours, compiled", "ours, nothing recomputed, compiled")
NEG_INFINITY = -1e6
# On a CPU glibc gives blocks above 32 MB back to the system as soon as they are free, and the next step pays for fresh pages.
# Every side keeps those of up to 128 MB: activations, but no tensor of whole logits, which would tear the heap apart.
KEEP_FREED_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**27), "MALLOC_TRIM_THRESHOLD_": str(2**35)}


def coupled_pair(trainer: MCDTrainer, x_0: torch.Tensor):
    """The noise of a step as `MCDTrainer.compute_loss` draws it: masks, canvases and noise levels at t and s."""
    delta = trainer.args.delta_of(0)
    everywhere = torch.ones_like(x_0, dtype=torch.bool)
    times, u = trainer.noise_of_batch(everywhere)
    t = 1 - (1 - delta) * times
    gammas = trainer.schedule.gamma(t), trainer.schedule.gamma(t - delta)
    pair = trainer.process.coupled_pair(x_0, *gammas, u, everywhere)
    return [masked for _, masked in pair], [canvas for canvas, _ in pair], [sigma_of(gamma) for gamma in gammas]


def subs(logits: torch.Tensor, z: torch.Tensor, mask_token_id: int) -> torch.Tensor:
    """`_subs_parameterization` of MDLM, SDTT and Duo: [MASK] removed, normalised, visible tokens made point masses."""
    logits[:, :, mask_token_id] += NEG_INFINITY
    logits = logits - torch.logsumexp(logits, dim=-1, keepdim=True)
    visible = z != mask_token_id
    logits[visible] = NEG_INFINITY
    logits[visible, z[visible]] = 0
    return logits


def plain_loss(trainer: MCDTrainer, model: MDLMForMaskedDiffusion, x_0: torch.Tensor) -> torch.Tensor:
    (m_t, m_s), (z_t, z_s), (sigma_t, sigma_s) = coupled_pair(trainer, x_0)
    log_p = subs(model(input_ids=z_t, timesteps=sigma_t).logits.float(), z_t, trainer.mask_token_id)
    with torch.no_grad():
        logits = trainer.teacher(input_ids=z_s, timesteps=sigma_s).logits.float() / trainer.args.tau_of(0)
        log_q = subs(logits, z_s, trainer.mask_token_id)
    kl = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    cross_entropy = -log_p.gather(-1, x_0[..., None])[..., 0]
    return (torch.where(m_s, kl, 0) + torch.where(m_t & ~m_s, cross_entropy, 0)).sum() / x_0.numel()


def our_loss(trainer: MCDTrainer, model: MDLMForMaskedDiffusion, x_0: torch.Tensor) -> torch.Tensor:
    return trainer.compute_loss(model, {"input_ids": x_0})


def build_with_head(options: argparse.Namespace, seed: int) -> MDLMForMaskedDiffusion:
    model = build_network(options, seed)
    model.lm_head.weight.data.normal_(std=options.hidden_size**-0.5)
    return model


def measure_floor(options: argparse.Namespace, trainer: MCDTrainer, x_0: torch.Tensor) -> dict:
    (m_t, m_s), canvases, sigmas = coupled_pair(trainer, x_0)
    device, width = x_0.device, options.hidden_size
    dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else torch.float32
    weight = trainer.model.lm_head.weight.detach().to(dtype)
    rows = {name: torch.randn(int(m.sum()), width, device=device, dtype=dtype) for name, m in (("t", m_t), ("s", m_s))}
    of_weight = torch.zeros_like(weight)
    chunk = max(1, 2 ** (26 if device.type == "cuda" else 23) // len(weight))

    @torch.no_grad()
    def trunks(network, number: int, at: int):
        for _ in range(number):
            network.model(input_ids=canvases[at], timesteps=sigmas[at])

    @torch.no_grad()
    def head():
        for hidden in rows["t"].split(chunk):
            logits = hidden @ weight.T
            logits @ weight
            of_weight.addmm_(logits.T, hidden)
        for hidden in rows["s"].split(chunk):
            hidden @ weight.T

    seconds = {}
    parts = {
        "student_trunks": lambda: trunks(trainer.model, 3, 0),
        "teacher_trunk": lambda: trunks(trainer.teacher, 1, 1),
        "head": head,
    }
    for name, part in parts.items():
        for attempt in range(options.warmup + options.steps):
            if attempt == options.warmup:
                synchronize()
                start = time.perf_counter()
            part()
        synchronize()
        seconds[name] = (time.perf_counter() - start) / options.steps
    return {"seconds": sum(seconds.values()), "parts": seconds}


def make_step(trainer: MCDTrainer, x_0: torch.Tensor, side: str) -> tuple[Callable[[], None], list[torch.Tensor]]:
    """A step of a side, to be called again and again, and the losses of its calls."""
    model = trainer.model
    if "nothing recomputed" not in side:
        # The name that transformers before 5.20 has.
        getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
    if side in COMPILED:
        for network in (model, trainer.teacher):
            compile_trunk(network, {"backend": "inductor"})
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-5, fused=True)  # the Trainer's default
    loss_of, losses = plain_loss if side == "plain" else our_loss, []

    def step():
        trainer.state.global_step = len(losses)
        with trainer.compute_loss_context_manager():
            loss = loss_of(trainer, model, x_0)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())

    return step, losses


def measure_step(options: argparse.Namespace, trainer: MCDTrainer, x_0: torch.Tensor, side: str) -> dict:
    step, losses = make_step(trainer, x_0, side)
    start = time.perf_counter()
    for _ in range(max(options.warmup, side in COMPILED)):
        step()
    synchronize()
    warmup_seconds = time.perf_counter() - start
    with PeakMemory() as peak:
        start = time.perf_counter()
        for _ in range(options.steps):
            step()
        synchronize()
        seconds = (time.perf_counter() - start) / options.steps
    losses = [loss.item() for loss in losses]
    return {"seconds": seconds, "warmup_seconds": warmup_seconds, "peak_gb": peak.total / 1e9, "losses": losses}


def measure(side: str, options: argparse.Namespace) -> dict:
    with tempfile.TemporaryDirectory() as folder:
        trainer, x_0 = build_trainer(options, folder, *(build_with_head(options, seed) for seed in (0, 1)))
        if side == "floor":
            with trainer.compute_loss_context_manager():
                return measure_floor(options, trainer, x_0)
        return measure_step(options, trainer, x_0, side)


def operations(options: argparse.Namespace) -> float:
    """Floating-point operations of a step that count for MFU, see `step_meter.py`, half of the tokens masked."""
    with torch.device("meta"):
        count = Operations.of(build_network(options, 0)).count
    tokens, length = options.batch_size * options.length, options.length
    return count(tokens, length, tokens / 2, trains=True) + count(tokens, length, tokens / 2, trains=False)


def largest_batch(options: argparse.Namespace) -> int:
    """From the peaks of the plain step at one and two rows, and the memory that there is; one tenth is left free."""
    one, two = (run(options, "plain", rows, warmup=1, steps=1)["peak_gb"] for rows in (1, 2))  # with AdamW's state
    available = 0.9 * memory_available() / 1e9
    batch_size = int((available - one) / max(two - one, 1e-6)) + 1
    if batch_size < 1:
        raise SystemExit(f"the plain step needs {one:.1f} GB for one row, but only {available:.1f} GB are free")
    print(
        f"plain step: {one:.2f} GB for one row, {two:.2f} GB for two; {available:.1f} GB free: {batch_size} rows fit"
    )
    return batch_size


def run(options: argparse.Namespace, side: str, batch_size: int, warmup: int, steps: int) -> dict:
    shape = ("length", "layers", "hidden_size", "vocab_size")
    words = [word for name in shape for word in (f"--{name}", str(getattr(options, name)))]
    words += ["--batch_size", str(batch_size), "--warmup", str(warmup), "--steps", str(steps), "--measure", side]
    return in_its_own_process("benchmarks.distillation_step", *words, environment=KEEP_FREED_MEMORY)


def main():
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch_size", type=count, help="rows; the largest batch that the plain step fits by default")
    parser.add_argument("--length", type=count, default=1024)
    parser.add_argument("--layers", type=count, default=12)
    parser.add_argument("--hidden_size", type=count, default=768)
    parser.add_argument("--vocab_size", type=count, default=50258)
    parser.add_argument("--warmup", type=int, default=3 if on_gpu else 1)
    parser.add_argument("--steps", type=count, default=10 if on_gpu else 1, help="timed steps of each measurement")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--peak_tflops", type=float, default=989.0, help="dense bf16 peak of the GPU, for MFU")
    parser.add_argument("--compile", action="store_true", help="our sides with compiled trunks, too")
    parser.add_argument("--measure", choices=SIDES + COMPILED, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(options.measure, options)))
        return

    options.batch_size = options.batch_size or largest_batch(options)

    def measured(side: str) -> dict:
        result = run(options, side, options.batch_size, options.warmup, options.steps)
        memory = f", peak {result['peak_gb']:.2f} GB" if side != "floor" else ""
        print(f"{side:>34}: {result['seconds']:.3f} s a step{memory}", flush=True)
        return result

    sides = SIDES + COMPILED if options.compile else SIDES
    runs = alternate(sides, options.repeats, measured)
    first = {side: results[0]["losses"][0] for side, results in runs.items() if side != "floor"}
    for loss in first.values():
        assert abs(loss - first["plain"]) <= (1e-2 if on_gpu else 1e-4) * first["plain"], f"other losses: {first}"
    seconds = {side: statistics.median(result["seconds"] for result in results) for side, results in runs.items()}
    peaks = {
        side: statistics.median(r["peak_gb"] for r in results) for side, results in runs.items() if side != "floor"
    }
    ratios = {}
    for suffix in ("", ", compiled") if options.compile else ("",):
        ours, lean, key = f"ours{suffix}", f"ours, nothing recomputed{suffix}", "_compiled" * bool(suffix)
        ratios |= {
            f"time_over_plain{key}": seconds[ours] / seconds["plain"],
            f"memory_over_plain{key}": peaks[ours] / peaks["plain"],
            f"time_over_floor{key}": seconds[ours] / seconds["floor"],
            f"time_over_floor_nothing_recomputed{key}": seconds[lean] / seconds["floor"],
        }
        print(
            f"{ours}, over the plain step: time {ratios[f'time_over_plain{key}']:.2f} (at most 0.8), "
            f"peak memory {ratios[f'memory_over_plain{key}']:.2f} (at most 0.6)\n"
            f"{ours}, over the floor: {ratios[f'time_over_floor_nothing_recomputed{key}']:.2f} (at most 1.2), "
            f"with activation checkpointing {ratios[f'time_over_floor{key}']:.2f}"
        )
    speed = {}
    for side in seconds:
        speed[side] = {"tokens_per_second": options.batch_size * options.length / seconds[side]}
        if on_gpu:
            speed[side]["mfu"] = operations(options) / seconds[side] / (options.peak_tflops * 1e12)
        print(f"{side:>34}: " + ", ".join(f"{name} {value:.3g}" for name, value in speed[side].items()))
    settings = {name: value for name, value in vars(options).items() if name != "measure"}
    content = {"runs": runs, "seconds": seconds, "peak_gb": peaks, "ratio": ratios, "speed": speed}
    write_result("distillation_step" + "_compiled" * options.compile, {"settings": settings, **content})


if __name__ == "__main__":
    main()
