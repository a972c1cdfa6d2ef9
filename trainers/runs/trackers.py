"""The table and the plot of a report, for the trackers that the Trainer's own integrations have opened."""

import importlib
from pathlib import Path

import numpy as np
from PIL import Image
from transformers.integrations import TensorBoardCallback, TrackioCallback, WandbCallback

from evaluation import load_report
from evaluation.figures import FIGURES


# Of the table: what a row is of, its figures, and a text.
COLUMNS = ["model", "locking", "steps", "temperature", "nfe", *(figure.name for figure in FIGURES), "bound", "example"]
MODULES = {WandbCallback: "wandb", TrackioCallback: "trackio"}  # one interface


def show_report(trainer, folder: Path):
    """Sends the table and the plot of a folder to TensorBoard, W&B and Trackio, at the step that the Trainer is at.

    What `Trainer.log` sends are numbers and texts: it has no tables and no pictures, and writes all of it into every checkpoint.
    To be called by the first process alone, after `Trainer.log`.
    """
    step, plot = trainer.state.global_step, np.asarray(Image.open(folder / "eval.png").convert("RGB"))
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, TensorBoardCallback) and callback.tb_writer is not None:
            callback.tb_writer.add_text("eval/table", (folder / "eval.md").read_text(encoding="utf-8"), step)
            callback.tb_writer.add_image("eval/plot", plot, step, dataformats="HWC")
        elif type(callback) in MODULES:
            tracker = importlib.import_module(MODULES[type(callback)])
            rows = [[row.get(column) for column in COLUMNS] for row in load_report(folder)["results"]]
            table = tracker.Table(columns=COLUMNS, data=rows)
            tracker.log({"eval/table": table, "eval/plot": tracker.Image(plot), "train/global_step": step})
