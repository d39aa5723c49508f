"""Tasks: data as batches, a loss, a metric. One file each."""

from s2d.data.base import SPLITS, Batch, Split, check_split
from s2d.tasks.base import Task, create, register, tasks

__all__ = ["SPLITS", "Batch", "Split", "Task", "check_split", "create", "register", "tasks"]
