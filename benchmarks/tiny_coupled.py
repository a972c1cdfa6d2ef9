"""Makes `recipes/tiny/coupled` of a run of `tiny_coupling.yaml`: the shipped teacher with a chain over its head.

    python -m benchmarks.tiny_coupled RUN [OUT]

The network is the teacher's, so its weights are a link to them; the chain's, in bfloat16, are a second shard.
"""

import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from modeling_mcd.files import write_atomically
from modeling_mcd.loading import load_model


ROOT = Path(__file__).resolve().parent.parent
NETWORK, CHAIN = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
COPIED = ("tokenizer.json", "tokenizer_config.json")
STEPS = 4  # of `generate`: twice as many are hardly better


def main(run: str | None = None, out: str = str(ROOT / "recipes" / "tiny" / "coupled")):
    if run is None:
        raise SystemExit(__doc__)
    run, out, teacher = Path(run), Path(out), ROOT / "recipes" / "tiny" / "teacher" / "model.safetensors"
    chain, network = {}, load_file(teacher)
    for name, weight in load_file(run / "model.safetensors").items():
        if name.startswith("coupling."):
            chain[name] = weight.to(torch.bfloat16)
        elif not torch.equal(weight.to(network[name]), network[name]):
            raise SystemExit(f"{name} of {run} is not that of {teacher}: the run started from another teacher")
    out.mkdir(parents=True, exist_ok=True)
    save_file(chain, out / CHAIN, metadata={"format": "pt"})
    (out / NETWORK).unlink(missing_ok=True)
    (out / NETWORK).symlink_to(Path("..") / "teacher" / "model.safetensors")
    size = sum(weight.nbytes for weight in (*network.values(), *chain.values()))
    where = dict.fromkeys(sorted(network), NETWORK) | dict.fromkeys(sorted(chain), CHAIN)
    index = {"metadata": {"total_size": size}, "weight_map": where}
    write_atomically(out / "model.safetensors.index.json", json.dumps(index, indent=2) + "\n")
    config = json.loads((run / "config.json").read_text()) | {"dtype": "bfloat16"}
    config.pop("auto_map", None)  # the package beside it is what the shipped weights are loaded with
    write_atomically(out / "config.json", json.dumps(config, indent=2, sort_keys=True) + "\n")
    sampling = json.loads((run / "generation_config.json").read_text()) | {"steps": STEPS}
    write_atomically(out / "generation_config.json", json.dumps(sampling, indent=2, sort_keys=True) + "\n")
    for name in COPIED:
        write_atomically(out / name, (run / name).read_text())
    print(load_model(out).config.coupling)


if __name__ == "__main__":
    main(*sys.argv[1:])
