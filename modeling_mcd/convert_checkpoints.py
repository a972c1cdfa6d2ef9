"""Every published checkpoint of the family (MDLM, SDTT, Duo and their kin) as our model, and our model in their layouts.

mcd-convert SOURCE OUT [--revision R] [--ema] [--to ours|mdlm|sdtt|duo]
"""

import os
from pathlib import Path

import torch

from .checkpoint_layouts import save_published
from .command_line import OneLineParser
from .files import new_folder
from .loading import load_model
from .modeling_mdlm import MDLMForMaskedDiffusion


LAYOUTS = ("ours", "mdlm", "sdtt", "duo")


def convert(
    source: str, out: str, to: str = "ours", dtype: torch.dtype = torch.float32, **options
) -> MDLMForMaskedDiffusion:
    """Loads `source` (see `load_model`) and writes it as the repository folder `out`.

    Args:
        source: Hub id, `id@revision`, folder, or file.
        out: must not be there yet.
        to: the layout of `out`, one of `LAYOUTS`.
        dtype: of the weights in `out`.
        options: see `load_model`.

    Raises:
        ValueError: the source cannot be loaded, the layout cannot hold it, or `out` cannot be written. Nothing is then
            left behind.
    """
    if to not in LAYOUTS:
        raise ValueError(f"to must be one of {list(LAYOUTS)}, not {to!r}")
    check_out(Path(out), Path(source))
    model = load_model(source, dtype, **options)
    with new_folder(Path(out)) as folder:
        if to == "ours":
            model.save_pretrained(folder)
        else:
            save_published(model, folder, to)
    return model


def check_out(out: Path, source: Path):
    """Raises ValueError unless a folder can be made at `out`, outside the source."""
    if os.path.lexists(out):
        raise ValueError(f"{str(out)!r} is already there: remove it, or choose another folder to write")
    if os.path.isdir(source) and out.resolve().is_relative_to(source.resolve()):
        raise ValueError(f"{str(out)!r} is inside the source {str(source)!r}: choose a folder outside it")
    parent = next(parent for parent in out.absolute().parents if os.path.lexists(parent))
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ValueError(f"{str(out)!r} cannot be written: {str(parent)!r} is not a folder that you may write to")


def main(arguments: list[str] | None = None):
    """The command line. A mistake of the user ends in one line on standard error, see `command_line.py`."""
    parser = OneLineParser(prog="mcd-convert", description=__doc__.split("\n")[0])
    parser.add_argument("source", metavar="SOURCE", help="Hub id, id@revision, folder, or file.")
    parser.add_argument("out", metavar="OUT", help="Folder to write; must not be there yet.")
    parser.add_argument("--revision", help="Branch, tag or commit on the Hub.")
    parser.add_argument("--ema", action="store_true", help="The moving average of a Lightning file, not its weights.")
    parser.add_argument("--to", choices=LAYOUTS, default="ours", help="Layout of OUT.")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="float32", help="Of the weights."
    )
    parser.add_argument(
        "--kind", choices=("absorbing", "uniform"), help="The kind of noise, where no configuration says it."
    )
    parser.add_argument("--trust-pickle", action="store_true", help="Unpickle anything: that can run any code.")
    given = parser.parse_args(arguments)
    options = {"revision": given.revision, "ema": given.ema, "trust_pickle": given.trust_pickle}
    try:
        model = convert(
            given.source, given.out, given.to, getattr(torch, given.dtype), diffusion_kind=given.kind, **options
        )
    except Exception as error:
        parser.fail(error)
    print(f"{given.out}: {model.num_parameters():,} parameters, {model.config.diffusion_kind} diffusion")


if __name__ == "__main__":
    main()
