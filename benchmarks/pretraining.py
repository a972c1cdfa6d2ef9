"""Ways to pre-train a small model, compared at equal steps and by processor time: AdamW, Muon, Muon with spread masks.

    python -m benchmarks.pretraining [--steps 1500]

Trains 1.2M parameters on the text of recipes/bible once for each way and learning rate, and writes the validation NELBO of the
EMA and the processor time of a step to `benchmarks/results/pretraining.json`. A command that was killed goes on where it was.
"""

import argparse
import itertools
import json
import tempfile
import time
from pathlib import Path

from benchmarks.coupling_bound import ROOT, saved
from benchmarks.measuring import count, write_result
from trainers.run_mdlm import main as pretrain


RECIPE = str(ROOT / "recipes" / "bible_teacher.yaml")
SHAPE = {"hidden_size": 96, "num_hidden_layers": 4, "num_attention_heads": 3, "conditioning_size": 16}
SHAPE |= {"block_length": 64, "per_device_train_batch_size": 16}
WAYS = {
    "AdamW": {"muon": "false", "locking": "independent"},
    "Muon": {"muon": "true", "locking": "independent"},
    "Muon, spread masks": {"muon": "true", "locking": "spread"},
}


def measure(steps: int, rate: float, way: dict[str, str]) -> dict[str, float]:
    settings = {**SHAPE, **way, "learning_rate": rate, "max_steps": steps, "warmup_steps": max(1, steps // 10)}
    settings |= {"lr_scheduler_type": "constant_with_warmup", "lr_scheduler_kwargs": "null"}  # at any number of steps
    settings |= {"eval_strategy": "no", "save_strategy": "no", "use_cpu": "true", "disable_tqdm": "true"}
    settings |= {"ema_decay": 0.95, "logging_steps": steps}
    with tempfile.TemporaryDirectory() as folder:
        words = [word for key, value in settings.items() for word in (f"--{key}", str(value))]
        start = time.process_time()
        pretrain([RECIPE, *words, "--output_dir", f"{folder}/run"])
        seconds = time.process_time() - start
        nelbo = json.loads(Path(folder, "run", "eval_results.json").read_text())["nelbo"]
    return {"nelbo": nelbo, "processor_seconds": seconds}


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=count, default=1500)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-3, 3e-3, 1e-2])
    parser.add_argument("--output", help="File for the figures, instead of the committed one.")
    options = parser.parse_args(arguments)
    path = Path(options.output or ROOT / "benchmarks" / "results" / "pretraining.json")
    content = saved(path, {"steps": options.steps, "shape": SHAPE}, figures=[])
    done = {(row["learning_rate"], row["way"]) for row in content["figures"]}
    runs, start = [run for run in itertools.product(options.rates, WAYS) if run not in done], time.perf_counter()
    for number, (rate, name) in enumerate(runs, start=1):
        print(f"{number} of {len(runs)}: {name}, learning rate {rate:g}, {options.steps} steps", flush=True)
        row = {"way": name, "learning_rate": rate, **measure(options.steps, rate, WAYS[name])}
        content["figures"].append(row)
        left = (time.perf_counter() - start) / number * (len(runs) - number) / 60
        seconds = row["processor_seconds"] / options.steps
        print(
            f"NELBO {row['nelbo']:.4f} nats a token, {seconds:.2f} s of processor a step; {left:.1f} minutes left",
            flush=True,
        )
        write_result("pretraining", content, path)


if __name__ == "__main__":
    main()
