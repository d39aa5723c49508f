"""Tasks: data as batches, a loss, a metric. One file each."""

from s2d.data.base import SPLITS, Batch, Split
from s2d.tasks.base import Task, create, register, tasks

__all__ = ["SPLITS", "Batch", "Split", "Task", "create", "register", "tasks"]
