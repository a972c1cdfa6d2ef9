"""Every published checkpoint of the family (MDLM, SDTT, Duo and their kin) as our model, and our model in their layouts.

LLaDA, Dream, A2D, SDAR and Fast-dLLM v2 as the network of transformers that each one is.

mcd-convert SOURCE OUT [--revision R] [--ema] [--to ours|native|mdlm|sdtt|duo] [--block-size N]
"""

import argparse
import os
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase
from transformers.utils import logging

from .backbone_layouts import save_native
from .checkpoint_layouts import save_published
from .command_line import OneLineParser
from .files import new_folder
from .loading import load_model, load_tokenizer
from .modeling_backbone_mdlm import MDLMBackboneForMaskedDiffusion
from .modeling_mdlm import MDLMForMaskedDiffusion


LAYOUTS = ("ours", "native", "mdlm", "sdtt", "duo")


logger = logging.get_logger(__name__)


def convert(
    source: str, out: str, to: str | None = None, dtype: torch.dtype = torch.float32, **options
) -> MDLMForMaskedDiffusion | MDLMBackboneForMaskedDiffusion:
    """Loads `source` (see `load_model`) and writes it as the repository folder `out`.

    Args:
        source: Hub id, `id@revision`, folder, or file.
        out: must not be there yet.
        to: the layout of `out`, one of `LAYOUTS`. "native", the default of a backbone, is a folder of the network's own
            class, with its tokenizer, that plain transformers loads; "ours" is the default of all others.
        dtype: of the weights in `out`.
        options: see `load_model`.

    Raises:
        ValueError: the source cannot be loaded, the layout cannot hold it, or `out` cannot be written. Nothing is then
            left behind.
    """
    if to not in (None, *LAYOUTS):
        raise ValueError(f"to must be one of {list(LAYOUTS)}, not {to!r}")
    check_out(Path(out), Path(source))
    model = load_model(source, dtype, **options)
    is_backbone = isinstance(model, MDLMBackboneForMaskedDiffusion)
    to = to or ("native" if is_backbone else "ours")
    if to != "ours" and is_backbone != (to == "native"):
        fitting = ["ours", "native"] if is_backbone else [layout for layout in LAYOUTS if layout != "native"]
        raise ValueError(f"to is {to!r}, but a {type(model).__name__} can be written as one of {fitting}")
    if to != "ours" and model.coupling is not None:
        raise ValueError(f"to is {to!r}, but that layout has no place for the model's coupling: give 'ours'")
    tokenizer = tokenizer_of(source, model) if is_backbone else None
    with new_folder(Path(out)) as folder:
        if to == "ours":
            model.save_pretrained(folder)
        elif to == "native":
            save_native(model, folder)
        else:
            save_published(model, folder, to)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder)
    return model


def tokenizer_of(source: str, model: MDLMBackboneForMaskedDiffusion) -> PreTrainedTokenizerBase | None:
    """The tokenizer beside a network, with its mask token named; None, and a warning, where there is none that loads.

    The ids that the network has beyond it are padding of the vocabulary, which `generate` is told never to draw.
    """
    try:
        tokenizer = load_tokenizer(source)
    except ValueError as error:
        logger.warning(f"no tokenizer was written: {error}")
        return None
    if tokenizer.mask_token_id is None:
        tokenizer.mask_token = tokenizer.convert_ids_to_tokens(model.config.mask_token_id)
    if len(tokenizer) < model.config.vocab_size and model.generation_config.suppress_above is None:
        model.generation_config.suppress_above = len(tokenizer)
    return tokenizer


def check_out(out: Path, source: Path):
    """Raises ValueError unless a folder can be made at `out`, outside the source."""
    if os.path.lexists(out):
        raise ValueError(f"{str(out)!r} is already there: remove it, or choose another folder to write")
    if os.path.isdir(source) and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{str(out)!r} is inside the source {str(source)!r}: choose a folder outside it")
    parent = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{str(out)!r} cannot be written: {str(parent)!r} is not a folder that you may write to")


def parser() -> OneLineParser:
    result = OneLineParser(prog="mcd-convert", description=__doc__.split("\n")[0])
    result.add_argument("source", metavar="SOURCE", help="Hub id, id@revision, folder, or file.")
    result.add_argument("out", metavar="OUT", help="Folder to write; must not be there yet.")
    result.add_argument("--revision", help="Branch, tag or commit on the Hub.")
    result.add_argument("--ema", action="store_true", help="The moving average of a Lightning file, not its weights.")
    result.add_argument(
        "--to", choices=LAYOUTS, help="Layout of OUT; ours by default, native for a network of transformers."
    )
    result.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Of the weights."
    )
    result.add_argument(
        "--kind", choices=("absorbing", "uniform"), help="The kind of noise, where no configuration says it."
    )
    result.add_argument(
        "--block-size", type=int, help="Tokens in a block, of SDAR or BD3-LM's A2D, where no configuration says it."
    )
    result.add_argument("--trust-pickle", action="store_true", help="Unpickle anything: that can run any code.")
    return result


def main(arguments: list[str] | None = None):
    """The command line. A mistake of the user ends in one line on standard error, see `command_line.py`."""
    parser().run(run, arguments)


def run(given: argparse.Namespace):
    options = {"revision": given.revision, "ema": given.ema, "trust_pickle": given.trust_pickle}
    options |= {"diffusion_kind": given.kind, "block_size": given.block_size}
    model = convert(given.source, given.out, given.to, getattr(torch, given.dtype), **options)
    print(f"{given.out}: {model.num_parameters():,} parameters, {model.config.diffusion_kind} diffusion")


if __name__ == "__main__":
    main()
