"""Rotation (QuaRot): orthogonal matrices between the weights spread single large channels over all of them.

Ashkboos et al., "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs", NeurIPS 2024, arXiv 2404.00456; names of the
rotations as in SpinQuant (arXiv 2405.16406). Every rotation is a Hadamard matrix with random signs, of order 2^k,
12 * 2^k, 20 * 2^k and so on (`hadamard`), folded in float64:

    R1  the residual stream: norms' gains and LayerScales are merged into the weights, then writers are turned by Q and
        readers by Q^T
    R2  v and the output projection, head by head
    R3  q and k, head by head: (q R)(k R)^T = q k^T. Left out where positions turn q and k themselves (rotary
        embeddings) or norms sit on them
    R4  the input of an MLP's second Linear, in every forward: no weight in front of an activation function can take it

How this differs from the paper:
- LayerNorm stays LayerNorm. It takes the mean out, so Q is made to keep the vector of ones (`random_rotation`), and
  then commutes with the norm; centring every writer, to make an RMSNorm of it, is not needed.
- A stream is turned by one product in front of its first block and turned back by one behind its last (D x D each, full
  precision, next to about 12 D x D a block), where the paper merges these two into embeddings and head. So whatever is
  outside the blocks stays as it is and exact: tied embeddings, CLIP's norm in front of the blocks, class tokens,
  pooling heads, final norms without a Linear behind them.
- Where norms follow the residual sum (BERT) the stream cannot be turned: the norm's gain sits between it and its
  readers. There the readers' inputs are turned like R4, in every forward; a warning says so.

Taking the quantizers out (`remove`) turns the weights back; norms keep their merged gains.
"""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence

import torch
from torch import nn

from s2d.errors import InputError
from s2d.models.graph import Graph
from s2d.quant.calibration.observe import Job, least_error
from s2d.quant.calibration.unchanged import function_kept
from s2d.quant.modules.folding import (
    AttentionParts,
    attention_parts,
    change_basis,
    is_post_norm,
    matrix,
    merge_norm,
    norm_folds,
    second_linears,
    streams,
)
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.modules.online import OnlineLinear, make_online, rotate_stream
from s2d.quant.modules.sites import Site
from s2d.quant.modules.stream_check import refuse_contradicted
from s2d.quant.numerics.hadamard import factors, random_rotation
from s2d.quant.ptq import register

_ROTARY = re.compile(r"rotary|rope", re.IGNORECASE)


_ROTATION_FIRST = "rotation comes before methods that scale or split layers; write rotation first"


def refuse_unknown_streams(model: nn.Module, sites: Sequence[Site], graph: Graph, earlier: Sequence[str]) -> None:
    """Raise InputError where a residual stream cannot be turned, or a method before adds work to a layer's input."""
    quantized = {site.module for site in sites if site.format is not None}
    if earlier and any(fold.residual and quantized & {*fold.readers} for fold in norm_folds(model, graph)):
        raise InputError(_ROTATION_FIRST)
    if not is_post_norm(model):
        refuse_contradicted(streams(model, "rotation"), graph, "rotation")


@register(
    "rotation",
    "QuaRot: Hadamard rotations of the residual stream, heads and MLP inputs",
    stage="transform",
    shares=True,
    check=refuse_unknown_streams,
)
def rotation(job: Job) -> None:
    """Rotate the model; the data are only looked at to check that its function was kept.

    Own protocol: ranges of least squared error (the paper's are each token's own, clipped, and searched for weights).

    Raises:
        InputError: Another method has added work to a layer's input already.
    """
    least_error(job)
    if any(isinstance(module, OnlineLinear) for module in job.model.modules()):
        raise InputError(_ROTATION_FIRST)
    post = is_post_norm(job.model)
    with function_kept(job, "rotation") as bases:
        if post:
            warnings.warn(
                f"{type(job.model).__name__} is post-norm: its residual stream cannot be rotated (R1); the inputs of "
                "its attention and MLP layers are rotated in every forward instead",
                stacklevel=2,
            )
        else:
            bases.update(rotate_residual(job))
        rotate_heads(job)
        readers = [reader for fold in norm_folds(job.model, job.graph) if fold.residual for reader in fold.readers]
        rotate_inputs(job, list(dict.fromkeys(readers + second_linears(job.model))))


def rotate_residual(job: Job) -> dict[str, torch.Tensor]:
    """R1, in place: every residual stream in a rotated basis, with the products that lead into and out of it.

    Returns:
        The rotation ``[D, D]`` of each block's output, but for the last of a stream, whose output has its own basis.
    """
    bases: dict[str, torch.Tensor] = {}
    for stream in streams(job.model, "rotation"):
        Q = random_rotation(stream.width, job.generator(f"rotation {stream.blocks[0]}"), keep_ones=stream.centred)
        for branch in stream.branches:
            merge_norm(job.model, branch)
        Q = Q.to(next(job.model.parameters()).device)
        change_basis(job.model, stream, Q)
        rotate_stream(job.model, stream.blocks[0], stream.blocks[-1], Q)
        bases |= dict.fromkeys(stream.blocks[:-1], Q)
    return bases


def rotate_heads(job: Job) -> None:
    """R2 and, where nothing turns q and k by position, R3: offline, in place."""
    rotary = any(_ROTARY.search(type(module).__name__) for module in job.model.modules())
    for parts in attention_parts(job.model, job.graph):
        rotate_values(job.model, parts, _of_heads(job, parts, "R2"))
        if not rotary and not parts.normed:
            R = _of_heads(job, parts, "R3")
            for name, start, stop in (parts.q, parts.k):
                _turn_rows(job.model, name, start, stop, R)


def rotate_inputs(job: Job, names: list[str]) -> None:
    """R4 and its like, in place: the inputs of these Linears are rotated in every forward, where they are quantized."""
    for name in names:
        module = job.model.get_submodule(name)
        if isinstance(module, QuantizedLinear):
            left, right = factors(module.weight.shape[1])
            device = module.weight.device
            make_online(module).rotate_input(left.to(device), right.to(device))


def rotate_values(model: nn.Module, parts: AttentionParts, rotation: torch.Tensor) -> None:
    """Turn every head of v by one R ``[head_dim, head_dim]`` (float64) and proj's columns likewise, in place."""
    values = parts.values
    _turn_rows(model, values.writer, *values.rows, rotation)
    weight, _ = matrix(model, values.reader)
    with torch.no_grad():
        turned = weight.double().unflatten(1, (values.heads, values.head_dim)) @ rotation
        weight.copy_(turned.flatten(1))


@torch.no_grad()
def _turn_rows(model: nn.Module, name: str, start: int, stop: int, rotation: torch.Tensor) -> None:
    weight, bias = matrix(model, name)
    size = len(rotation)
    turned = rotation.T @ weight[start:stop].double().unflatten(0, (-1, size))
    weight[start:stop] = turned.flatten(0, 1).to(weight.dtype)
    if bias is not None:
        bias[start:stop] = (bias[start:stop].double().unflatten(0, (-1, size)) @ rotation).flatten().to(bias.dtype)


def _of_heads(job: Job, parts: AttentionParts, which: str) -> torch.Tensor:
    R = random_rotation(parts.values.head_dim, job.generator(f"rotation {which} {parts.name}"))
    return R.to(matrix(job.model, parts.values.reader)[0].device)
