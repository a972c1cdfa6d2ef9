"""The table and the plot of a report, for the trackers that the Trainer's own integrations have opened."""

from pathlib import Path

import numpy as np
from PIL import Image
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback


COLUMNS = ("model", "locking", "steps", "temperature", "nfe", "gen_ppl", "entropy", "trigram_entropy", "bound")


def show_report(trainer, folder: Path, rows: list[dict]):
    """Sends `eval.md` and `eval.png` of a folder to TensorBoard; its rows, as a table, and the plot to W&B and Trackio.

    What `Trainer.log` sends are numbers and texts: it has no tables and no pictures, and writes all of it into every checkpoint.
    """
    step, plot = trainer.state.global_step, np.asarray(Image.open(folder / "eval.png").convert("RGB"))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("eval/table", (folder / "eval.md").read_text(encoding="utf-8"), step)
            callback.tb_writer.add_image("eval/plot", plot, step, dataformats="HWC")
        elif isinstance(callback, WandbCallback | TrackioCallback) and trainer.is_world_process_zero():
            import pandas as pd  # here, since a run without these trackers does not need it

            tracker = callback._wandb if isinstance(callback, WandbCallback) else callback._trackio  # one interface
            table = tracker.Table(dataframe=pd.DataFrame([{name: row.get(name) for name in COLUMNS} for row in rows]))
            tracker.log({"eval/table": table, "eval/plot": tracker.Image(plot), "train/global_step": step})
