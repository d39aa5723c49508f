"""Targets: a target is a weight (parameter name, slice), not a module. Selection by pattern, LoRA, calls."""

from s2d.targets.weights import Kind, Selector, Target, find_targets

__all__ = ["Kind", "Selector", "Target", "find_targets"]
