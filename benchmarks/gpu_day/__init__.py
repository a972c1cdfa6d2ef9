"""A day, or half an hour, with a GPU: everything that only a GPU can show, in stages that can be cut off at any moment.

    python -m benchmarks.gpu_day --dry-run                 # the plan, with estimated minutes
    python -m benchmarks.gpu_day check                     # then speed, teacher, students, tables: see docs/gpu_day.md
    python -m benchmarks.gpu_day all --scale cpu           # a rehearsal of everything on a CPU, in minutes

A stage is a list of pieces. Each finished piece is written at once, with all that was known before, to
`benchmarks/results/gpu_STAGE.json` (`rehearsal_gpu_STAGE.json` under `--scale cpu`), and is not done again: the same command goes
on where it was. Trainings go on from their last checkpoint.
"""

from benchmarks.gpu_day.command import main


__all__ = ["main"]
