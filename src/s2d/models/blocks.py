"""The transformer blocks of a model, in order."""

from __future__ import annotations

from collections.abc import Mapping

from torch import nn

from s2d.models.family import FALLBACK, family_of
from s2d.models.graph import Graph


def blocks_of(model: nn.Module, graph: Graph | None = None) -> dict[str, nn.Module]:
    """The transformer blocks by name, in the order in which they run.

    With a graph (`s2d.trace`): the outermost blocks that repeat in what the model did. Where there is no batch to trace
    (a penalty that is attached before training, the length of a progress bar): those of the model's family, and for
    models that no family knows the members of the longest ``nn.ModuleList`` or ``nn.Sequential`` that holds three or
    more modules (two, in a ModuleList) of one class with Linears in them; of all those lists when several tie.
    """
    if graph is not None:
        members = [path for blocks in graph.blocks if not blocks.inside for path, _ in blocks.members]
        return {path: model.get_submodule(path) for path in dict.fromkeys(members)}
    family = family_of(model)
    found = family.blocks(model)
    if found and not (family.name == FALLBACK and _nested(found)):
        return found
    return _longest_lists(model)


def _nested(names: Mapping[str, nn.Module]) -> bool:
    return any(other.startswith(f"{name}.") for name in names for other in names)


def _longest_lists(model: nn.Module) -> dict[str, nn.Module]:
    lists: dict[str, list[nn.Module]] = {}
    for name, module in model.named_modules():
        members = list(module.children()) if isinstance(module, (nn.ModuleList, nn.Sequential)) else []
        same = len({type(member) for member in members}) == 1
        many = len(members) >= (2 if isinstance(module, nn.ModuleList) else 3)
        inner = any(name.startswith(f"{outer}.") for outer in lists)
        holds = bool(members) and any(
            isinstance(part, nn.Linear) and part is not members[0] for part in members[0].modules()
        )
        if same and many and holds and not inner:
            lists[name] = members
    longest = max((len(members) for members in lists.values()), default=0)
    return {
        f"{name}.{child}".lstrip("."): module
        for name, members in lists.items()
        if len(members) == longest
        for child, module in model.get_submodule(name).named_children()
    }
