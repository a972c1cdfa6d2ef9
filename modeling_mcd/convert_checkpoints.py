"""Every published checkpoint of the family (MDLM, SDTT, Duo and their kin) as our model, and our model in their layouts.

    python -m modeling_mcd.convert_checkpoints SOURCE OUT [--revision R] [--ema] [--to ours|mdlm|sdtt|duo]

`load_model` is the loader of every entry point.
"""

import argparse
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from .checkpoint_layouts import (
    save_published,
)
from .files import new_folder
from .loading import load_model
from .modeling_mdlm import MDLMForMaskedDiffusion


# --- Where the weights are


# --- What is in them


# --- From one folder to another


def convert(
    source: str, out: str, to: str = "ours", dtype: torch.dtype = torch.float32, **options
) -> MDLMForMaskedDiffusion:
    """Loads `source` (see `load_model`) and writes it as the repository folder `out`, which must not be there yet."""
    if Path(out).exists():
        raise ValueError(f"{str(out)!r} is already there: remove it, or choose another folder to write")
    model = load_model(source, dtype, **options)
    with new_folder(Path(out)) as folder:
        if to == "ours":
            model.save_pretrained(folder)
        else:
            save_published(model, folder, to)
    return model


def main(arguments: list[str] | None = None):
    parser = argparse.ArgumentParser(
        prog="python -m modeling_mcd.convert_checkpoints", description=__doc__.split("\n")[0], allow_abbrev=False
    )
    parser.add_argument("source", metavar="SOURCE", help="Hub id, id@revision, folder, or file.")
    parser.add_argument("out", metavar="OUT", help="Folder to write; must not be there yet.")
    parser.add_argument("--revision", help="Branch, tag or commit on the Hub.")
    parser.add_argument("--ema", action="store_true", help="The moving average of a Lightning file, not its weights.")
    parser.add_argument("--to", choices=("ours", "mdlm", "sdtt", "duo"), default="ours", help="Layout of OUT.")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), default="float32")
    parser.add_argument("--kind", choices=("absorbing", "uniform"), help="The noise, where no configuration says it.")
    parser.add_argument("--trust-pickle", action="store_true", help="Unpickle anything: that can run any code.")
    given = parser.parse_args(arguments)
    options = {"revision": given.revision, "ema": given.ema, "trust_pickle": given.trust_pickle}
    try:
        model = convert(
            given.source, given.out, given.to, getattr(torch, given.dtype), diffusion_kind=given.kind, **options
        )
    except (OSError, ValueError, SafetensorError) as error:  # safetensors has its own for a full disk
        sys.exit(f"error: {' '.join(str(error).split())}")
    print(f"{given.out}: {model.num_parameters():,} parameters, {model.config.diffusion_kind} diffusion")


if __name__ == "__main__":
    main()
