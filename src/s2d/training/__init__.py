"""Training: one loop for fine-tuning, QAT and distillation; resumable, on one process or several."""

from s2d.training.batching import training_batches
from s2d.training.loop import train
from s2d.training.train_settings import Training, TrainSettings

__all__ = ["TrainSettings", "Training", "train", "training_batches"]
