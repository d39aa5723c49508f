"""Candidates: ways to make a file, their predicted cost, and the choice of those to export."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from s2d.export.lowering import SMALLEST_TABLE
from s2d.export.runtime import Runtime
from s2d.io.provenance import digest
from s2d.quant import QuantSpec, Site
from s2d.quant.ptq.svdquant import RANK

Objective = Literal["smallest", "fastest"]
_SAME = 0.02  # a candidate must be this much better than a safer one
_OTHER = 0.1  # the other quantity's share in the cost: a file 2.7 times as slow must be a tenth smaller
_MOST = 5  # files of one round


@dataclass(frozen=True)
class Candidate:
    """One way to make a file.

    Attributes:
        spec: Bits of every site.
        method: A name from `s2d.quant.methods`.
        embeddings: Bits of the embedding tables, 0 to keep them.
        rung: The step of the ladder that it comes from.
        conditioned: Minutes of conditioning (S2D) with distillation before the method; 0 for none.
        trained: Minutes of training with the quantizers in place; 0 for none.
    """

    spec: QuantSpec
    method: str
    embeddings: int
    rung: str
    conditioned: float = 0.0
    trained: float = 0.0

    @property
    def repaired(self) -> bool:
        """Whether its weights were trained in any way."""
        return self.conditioned > 0 or self.trained > 0

    @property
    def key(self) -> str:
        """Short and file-safe, different for different candidates."""
        content = self.to_dict()
        del content["rung"]
        return f"{self.label}-{digest(content)[:6]}"

    @property
    def label(self) -> str:
        """Short, for people."""
        activation = self.spec.activation
        observer = activation.observer if activation is not None and activation.granularity == "tensor" else ""
        parts = [str(self.spec), "mixed" if self.spec.overrides else ""]
        parts += [self.method if self.method != "rtn" else "", observer.replace(":", "")]
        parts += [f"e{self.embeddings}" if self.embeddings else "", "conditioned" if self.conditioned else ""]
        parts += ["trained" if self.trained else ""]
        return re.sub(r"[^\w.-]+", "-", "-".join(part for part in parts if part))

    def to_dict(self) -> dict[str, Any]:
        """JSON types; `from_dict` reads it."""
        return {**vars(self), "spec": self.spec.to_dict()}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Candidate:
        """The candidate that `to_dict` wrote."""
        return Candidate(**{**content, "spec": QuantSpec.parse(content["spec"])})


@dataclass(frozen=True)
class Scored:
    """A candidate that was tried in simulation, on training examples that its calibration did not see.

    Attributes:
        candidate: The candidate.
        error: Divergence of the output from full precision, in nats of an example.
        points: Drop of the score on these examples; it is optimistic, because they are training examples.
        bytes: Predicted size of the file.
        time: Predicted time relative to full precision; None where the runtime's times are not known.
        seconds: Time to quantize and evaluate it.
        predicted: Divergence that the scores predicted, uncorrected; None of trained weights.
    """

    candidate: Candidate
    error: float
    points: float
    bytes: int
    time: float | None
    seconds: float
    predicted: float | None = None

    def to_dict(self) -> dict[str, Any]:
        """JSON types."""
        return {**vars(self), "candidate": self.candidate.to_dict()}

    @staticmethod
    def from_dict(content: Mapping[str, Any]) -> Scored:
        """What `to_dict` wrote."""
        error = math.inf if content["error"] is None else content["error"]
        points = math.inf if content["points"] is None else content["points"]
        return Scored(
            **{**content, "candidate": Candidate.from_dict(content["candidate"]), "error": error, "points": points}
        )


def front(scored: Sequence[Scored], objective: Objective, most: int = _MOST) -> list[Scored]:
    """The Pareto front of the candidates, the safest first and the most wanted last.

    None of them is both less safe and less wanted than another, by `cost`.

    Args:
        scored: Candidates that were tried.
        objective: ``"smallest"`` or ``"fastest"``.
        most: Largest number of candidates; the first and the last are among them.
    """
    found: list[Scored] = []
    best = math.inf
    for each in sorted(scored, key=lambda each: (each.error, cost(each.bytes, each.time, objective))):
        least = cost(each.bytes, each.time, objective)
        if math.isfinite(each.error) and least < best - math.log1p(_SAME):
            best = least
            found.append(each)
    while len(found) > most:  # drop the one whose neighbours are closest to each other
        gaps = [math.log(found[i + 1].error + 1e-12) - math.log(found[i - 1].error + 1e-12) for i in _inner(found)]
        del found[1 + gaps.index(min(gaps))]
    return found


def _inner(members: Sequence[object]) -> range:
    return range(1, len(members) - 1)


def cost(size: float, time: float | None, objective: Objective) -> float:
    """What is to be small: the logarithm of the size (or the time), and a tenth of that of the other.

    Args:
        size: In any unit.
        time: In any unit; None where it is not known.
        objective: ``"smallest"`` or ``"fastest"``.
    """
    logarithms = math.log(max(size, 1.0)), math.log(1.0 if time is None else time)
    first, other = logarithms if objective == "smallest" else logarithms[::-1]
    return first + _OTHER * other


def file_bytes(model: nn.Module, sites: Sequence[Site], runtime: Runtime, embeddings: int) -> int:
    """Estimate the bytes of tensors in a file.

    Args:
        model: The plain model.
        sites: Its plan.
        runtime: Decides the stored width of codes.
        embeddings: Bits of the embedding tables, 0 to keep them.
    """
    total = sum(4 * parameter.numel() for parameter in model.parameters())
    for site in sites:
        if site.what == "weight" and site.format is not None:
            numbers = math.prod(site.shape)
            scales = {"channel": site.shape[0], "group": numbers // max(site.group, 1)}.get(site.granularity, 1)
            total += numbers * runtime.stored_bits(site.format.bits) // 8 + 4 * scales - 4 * numbers
    for table in tables_of(model) if embeddings else ():
        numbers = table.weight.numel()
        scales = table.num_embeddings if embeddings >= 8 else numbers // 32
        total += numbers * runtime.stored_bits(embeddings) // 8 + 4 * scales - 4 * numbers
    return total


def added_bytes(sites: Sequence[Site], method: str) -> int:
    """Bytes that a method adds to a plan's file: SVDQuant's branches, and at most a rotation's matrices."""
    shapes = [site.shape for site in sites if site.what == "weight" and site.format is not None]
    sizes = [(shape[0], math.prod(shape[1:])) for shape in shapes]
    branches = sum(4 * RANK * (outputs + inputs) for outputs, inputs in sizes) if "svdquant" in method else 0
    # The inputs of an MLP's second Linear are rotated in every forward; other rotations are in the weights.
    turned = sum(4 * inputs * inputs for outputs, inputs in sizes if inputs > outputs) if "rotation" in method else 0
    return branches + turned


def tables_of(model: nn.Module) -> list[nn.Embedding]:
    """The embedding tables that a file rounds: large ones that no other layer shares."""
    uses: dict[int, int] = {}
    for _, parameter in model.named_parameters(remove_duplicate=False):
        uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    tables = [module for module in model.modules() if type(module) is nn.Embedding]
    return [each for each in tables if each.num_embeddings >= SMALLEST_TABLE and uses[id(each.weight)] == 1]
