"""The table and the plot of a report, for TensorBoard as the Trainer's own integration has opened it."""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers.integrations import TensorBoardCallback


def show_report(trainer, folder: Path):
    """Sends `eval.md` and `eval.png` of a folder to TensorBoard.

    What `Trainer.log` sends are numbers and texts: it has no tables and no pictures, and writes all of it into every checkpoint.
    """
    step, plot = trainer.state.global_step, np.asarray(Image.open(folder / "eval.png").convert("RGB"))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("eval/table", (folder / "eval.md").read_text(encoding="utf-8"), step)
            callback.tb_writer.add_image("eval/plot", plot, step, dataformats="HWC")
