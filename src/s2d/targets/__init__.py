"""Targets: a target is a weight (parameter name, slice), not a module; selection by pattern, LoRA, who calls it."""

from s2d.targets.weights import Kind, Selector, Target, find_targets

__all__ = ["Kind", "Selector", "Target", "find_targets"]
