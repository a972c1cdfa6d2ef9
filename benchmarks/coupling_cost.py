"""What a coupled step costs beside a forward of the trunk: the 169M shape, a canvas of 1,024, all of it masked.

    python -m benchmarks.coupling_cost [--states 256] [--windows 0 128] [--runs 3]

Evidence is the softmax of the head's logits times [V, S]; the chain is the forward algorithm and the draw of all states. Every
part is timed in turn, in the precision of `generate`. Writes `benchmarks/results/coupling_cost.json`.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.measuring import circumstances, count, synchronize
from modeling_mcd import MDLMConfig, MDLMForMaskedDiffusion
from modeling_mcd.canvas_mdlm import Canvas
from modeling_mcd.coupling_mdlm import Chain, Chains
from modeling_mcd.files import write_atomically
from modeling_mcd.noise_mdlm import RowNoise, row_keys


RESULT = Path(__file__).resolve().parent / "results" / "coupling_cost.json"


def timed(function) -> float:
    synchronize()
    start = time.perf_counter()
    function()
    synchronize()
    return time.perf_counter() - start


@torch.no_grad()
def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("--states", type=count, default=256)
    parser.add_argument("--windows", type=int, nargs="+", default=[0, 128], help="0: one chain along the canvas.")
    parser.add_argument("--length", type=count, default=1024)
    parser.add_argument("--vocab_size", type=count, default=50258)
    parser.add_argument("--layers", type=count, default=12)
    parser.add_argument("--runs", type=count, default=3)
    parser.add_argument("--results", type=Path, default=RESULT)
    options = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = {"vocab_size": options.vocab_size, "num_hidden_layers": options.layers}
    shape |= {"max_position_embeddings": options.length}
    coupling = {"states": options.states, "levels": 1, "emission": "embedding"}
    model = MDLMForMaskedDiffusion(MDLMConfig(**shape, coupling=coupling)).to(device).eval()
    model.coupling.transition.data.normal_()
    masked = torch.ones(1, options.length, dtype=torch.bool)
    tokens = torch.full(masked.shape, model.config.mask_token_id, device=device)
    noise = RowNoise(row_keys(1, torch.Generator().manual_seed(0)), torch.arange(options.length)[None])
    canvas = Canvas(tokens, masked, noise, model.denoiser(coupling=True))
    chain, answer = canvas.denoiser.chains.at(0), canvas.ask(masked, 1.0)
    single = Chains(canvas.denoiser.chains.weights, None, torch.float32).at(0)
    evidence, present = answer.evidence(chain)
    everything, w = masked.to(device), canvas.w.to(device)
    parts = {
        "trunk": lambda: canvas.ask(masked, 1.0),
        "head": lambda: answer.map(lambda logits: logits[:, 0]),
        "head and evidence": lambda: answer.evidence(chain),
        "head and evidence, float32": lambda: answer.evidence(single),
    }
    for window in options.windows:
        cut = Chain(chain.start, chain.transition, chain.log_emission, window or None)
        name = f"chain, window {window}" if window else "chain"
        parts[name] = lambda cut=cut: cut.draw(evidence, present, everything, w)
    times = {name: [] for name in parts}
    for _ in range(options.runs):
        for name, part in parts.items():
            times[name].append(timed(part))
    medians = {name: statistics.median(values) for name, values in times.items()}
    shown = {
        name: {"seconds": round(t, 4), "of_a_trunk": round(t / medians["trunk"], 3)} for name, t in medians.items()
    }
    print(json.dumps(shown, indent=2))
    asked = {name: value for name, value in vars(options).items() if name != "results"}
    write_atomically(
        options.results, json.dumps({"options": asked, "parts": shown} | circumstances(), indent=2) + "\n"
    )


if __name__ == "__main__":
    main()
