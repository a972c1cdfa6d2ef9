"""Loading a 169M checkpoint with `load_model`, against `load_file` and `load_state_dict` of the same weights.

    python -m benchmarks.load_checkpoint [--layout mdlm] [--repeats 3]

Every load is a process of its own, alternating, with the files in the page cache. The clock starts after the imports and
stops when every weight has been read once (both map the file, so that loading alone would read nothing). The plain side
loads our layout into a network that is built without initial values, since it cannot rename. Prints the ratios of the
median times and of the peak memory, imports included, and writes `benchmarks/results/load_checkpoint.json`.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from benchmarks.measuring import alternate, count, in_its_own_process, medians, write_result
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from modeling_mcd.checkpoint_layouts import save_published
from modeling_mcd.loading import load_model


def plain(folder: Path) -> MDLMForMaskedDiffusion:
    with torch.device("meta"):
        model = MDLMForMaskedDiffusion(MDLMConfig())
    model.to_empty(device="cpu").load_state_dict(load_file(folder / "model.safetensors"))
    return model


def measure(load, folder: Path) -> dict:
    start = time.perf_counter()
    model = load(folder)
    with torch.no_grad():
        total = sum(parameter.sum().item() for parameter in model.parameters())
    seconds = time.perf_counter() - start
    return {
        "seconds": seconds,
        "peak_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "sum": total,
    }


def write_checkpoints(folder: Path, layout: str):
    model = MDLMForMaskedDiffusion(MDLMConfig())
    for parameter in model.parameters():
        parameter.data.normal_(std=0.02)
    model.save_pretrained(folder / "plain")
    (folder / "load_model").mkdir()
    if layout == "ours":
        model.save_pretrained(folder / "load_model")
    else:
        save_published(model, folder / "load_model", layout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--layout", choices=("ours", "mdlm", "sdtt", "duo"), default="mdlm")
    parser.add_argument("--repeats", type=count, default=3)
    parser.add_argument("--measure", nargs=2, metavar=("SIDE", "FOLDER"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        side, folder = options.measure
        print(json.dumps(measure({"plain": plain, "load_model": load_model}[side], Path(folder))))
        return
    with tempfile.TemporaryDirectory() as folder:
        write_checkpoints(Path(folder), options.layout)

        def load(side: str) -> dict:
            return in_its_own_process("benchmarks.load_checkpoint", "--measure", side, str(Path(folder) / side))

        runs = alternate(("plain", "load_model"), options.repeats, load)
    assert len({round(result["sum"], 2) for results in runs.values() for result in results}) == 1, "other weights"
    median = medians(runs, "seconds", "peak_gb")
    ratios = {key: median["load_model"][key] / median["plain"][key] for key in ("seconds", "peak_gb")}
    for side, values in median.items():
        print(f"{side:>10}: {values['seconds']:.2f} s, peak {values['peak_gb']:.2f} GB")
    print(f"     ratio: {ratios['seconds']:.2f} (at most 1.3), peak {ratios['peak_gb']:.2f} (at most 1.2)")
    content = {"layout": options.layout, "runs": runs, "median": median, "ratio": ratios}
    write_result("load_checkpoint", content)


if __name__ == "__main__":
    main()
