"""Benchmarks: tasks, models and seeds in one resumable run, and honest rankings."""

from ._cell_eval import export_cell_eval, import_cell_eval
from ._cli import add_arguments, main
from ._leaderboard import leaderboard
from ._run import ModelSpec, costs, run
from ._task import TASKS, Task

__all__ = [
    "TASKS",
    "ModelSpec",
    "Task",
    "add_arguments",
    "costs",
    "export_cell_eval",
    "import_cell_eval",
    "leaderboard",
    "main",
    "run",
]
