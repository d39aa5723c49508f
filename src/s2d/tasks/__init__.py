"""Tasks: data as batches, a loss, a metric. Each task is one file."""

from s2d.data.base import SPLITS, Batch, Split, check_split
from s2d.tasks.base import Task, create, register, tasks

__all__ = ["SPLITS", "Batch", "Split", "Task", "check_split", "create", "register", "tasks"]
