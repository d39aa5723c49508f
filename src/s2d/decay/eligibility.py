"""Eligibility: the weights that the decay may change, and the reason for each one left out."""

from __future__ import annotations

import math
from collections.abc import Container, Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrize import ParametrizationList

from s2d.distributed.sharding import is_dtensor
from s2d.errors import InputError
from s2d.targets.lora import AdaptedTarget, why_not_a_sum
from s2d.targets.stacked import StackTarget
from s2d.targets.weights import Target, clean_name


def eligible(
    model: nn.Module, found: Iterable[Target], trained: Container[int], *, coupled: bool, frozen: bool
) -> tuple[list[Target], dict[str, str]]:
    """Keep the weights that an optimizer trains, with `frozen` the others as well.

    Args:
        model: The model of the targets.
        found: The targets.
        trained: Identities of the parameters that an optimizer holds.
        coupled: Coupled mode adds to the gradients, so the weights must have one.
        frozen: Keep untrained weights as well.

    Returns:
        The targets kept; the others by name, with the reason.

    Raises:
        InputError: A weight is sharded in a way that has no rows, or nothing is left.
    """
    kept, skipped = sort_out(model, found, trained, coupled=coupled, frozen=frozen)
    if not kept:
        name, reason = next(iter(skipped.items()))
        asleep = any(why.startswith("frozen") for why in skipped.values())
        raise InputError(
            f"nothing to condition: all {len(skipped)} matching weights are left out, e.g. {name}: {reason}"
            + ("; frozen=True shrinks frozen weights too, as training with LoRA needs" if asleep else "")
        )
    return kept, skipped


def sort_out(
    model: nn.Module, found: Iterable[Target], trained: Container[int], *, coupled: bool, frozen: bool
) -> tuple[list[Target], dict[str, str]]:
    """As `eligible`, at the present state; the result may be empty."""
    owners: dict[int, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        owners.setdefault(id(parameter), set()).add(name)
    kept: list[Target] = []
    skipped: dict[str, str] = {}
    for target in found:
        reason = _reason(target, owners, trained, coupled, frozen)
        if reason is None:
            kept.append(target)
        else:
            skipped[target.name] = reason
    return kept, skipped


def no_matrices(model: nn.Module) -> dict[str, str]:
    """Weights of products that are not a single stored matrix and so no targets, by name, with the reason."""
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        name = clean_name(path)
        name = f"{name}." if name else ""
        if isinstance(module, nn.Linear | nn.Conv1d | nn.Conv2d | nn.Conv3d) and "weight" not in module._parameters:
            found[f"{name}weight"] = (
                "computed from other parameters (parametrized, weight norm, pruned); remove that first"
            )
        elif not isinstance(module, nn.modules.conv._ConvNd | ParametrizationList):  # what a weight is computed from
            for own, parameter in module._parameters.items():
                if parameter is not None and parameter.ndim == 3 and min(parameter.shape) > 1:
                    found[f"{name}{own}"] = (
                        "several matrices in one parameter (experts) that write no site which is known to be theirs; "
                        "what they read is conditioned"
                    )
    return found


def _reads_ids(module: nn.Module) -> bool:
    """Whether an embedding gives the rows of the numbers that it reads, in their order, perhaps scaled."""
    if type(module).forward is nn.Embedding.forward or not isinstance(module, nn.Embedding):
        return True
    weight = module.weight
    if is_dtensor(weight) or module.max_norm is not None or len(weight) < 2 or weight.is_meta:
        return True
    with torch.no_grad():
        try:
            made = module.forward(torch.tensor([[1, 0]], device=weight.device))
        except (TypeError, ValueError, RuntimeError, IndexError, AttributeError):
            return False
        rows = weight[[1, 0]][None]
        if not isinstance(made, Tensor) or made.shape != rows.shape:
            return False
        scale = made.double().norm() / rows.double().norm().clamp(min=1e-30)
        return bool((made.double() - scale * rows.double()).norm() <= 0.01 * made.double().norm())


def _reason(
    target: Target, owners: dict[int, set[str]], trained: Container[int], coupled: bool, frozen: bool
) -> str | None:
    """Why a weight is left out, None where it is not."""
    parameter = target.owner._parameters.get(target.parameter_name)
    if parameter is None:
        return "its parameter is gone: parametrized, pruned or removed"
    if isinstance(target, StackTarget) and is_dtensor(parameter):
        return "a sharded parameter of several experts; only what they read is conditioned"
    if isinstance(target, StackTarget) and coupled and target.summed == 1:
        return "its matrices are stored [in, out], which mode='coupled' does not reach; use mode='decoupled'"
    if math.isnan(target.offset):
        return "its output is no linear function of its weight"
    if target.kind != "norm" and parameter.ndim < 2:
        raise InputError(
            f"{target.name} is sharded into a flat vector without rows; shard by torch.distributed.fsdp.fully_shard "
            "(FSDP2), or use DDP"
        )
    if is_dtensor(parameter) and (isinstance(target, AdaptedTarget) or (frozen and id(parameter) not in trained)):
        raise InputError(
            f"{target.name} is sharded and not trained itself (LoRA); conditioning that is not supported: "
            "use DDP, or merge the adapter and train all weights"
        )
    if ".lora_" in f".{target.name}" or "lora_embedding" in target.name:
        return "a LoRA factor, not the weight that runs"
    if not frozen and not parameter.requires_grad:
        return "frozen (requires_grad is False)"
    if not frozen and id(parameter) not in trained:
        return "no optimizer passed here holds it"
    if (reason := why_not_a_sum(target)) is not None:
        return reason
    if target.kind == "embedding" and not _reads_ids(target.owner):
        return "its rows are not looked up by the numbers that it is given (positions)"
    if getattr(target.owner, "groups", 1) != 1:
        return "a grouped convolution, which is not one matrix"
    if target.kind == "conv" and not parameter.is_contiguous():
        return "stored channels last; use model.to(memory_format=torch.contiguous_format)"
    if coupled and getattr(target.owner, "sparse", False):
        return "its gradient is sparse; use mode='decoupled'"
    if len(owners.get(id(parameter), ())) > 1:
        return "tied to " + ", ".join(sorted(owners[id(parameter)]))
    return None
