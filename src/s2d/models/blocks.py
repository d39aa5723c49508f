"""The transformer blocks of a model, in order."""

from __future__ import annotations

from torch import nn

from s2d.models.graph import Graph


def blocks_of(model: nn.Module, graph: Graph) -> dict[str, nn.Module]:
    """The outermost blocks that repeat in a traced forward (`s2d.trace`), by name, in the order in which they run."""
    members = [path for blocks in graph.blocks if not blocks.inside for path, _ in blocks.members]
    return {path: model.get_submodule(path) for path in dict.fromkeys(members)}
