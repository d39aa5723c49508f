"""The audit itself: spectra of the weights, then two passes over the data through forward hooks.

The first pass finds ranges, energies and second moments. They give the principal directions and the quantizers. The
second pass uses these to find PCDR and quantization error. Memory does not depend on the number of batches: beside the
model and one batch's activations it takes at most the size of the weights once more.

Activations are ``A = x W^T``, without the bias, as in the definition of PCDR ("Selective Spectral Decay",
arXiv 2602.14432). Which of them are outliers is the choice of `s2d.spectral.pcdr`.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn

from s2d.audit.accumulators import Judgement, Survey
from s2d.audit.findings import Audit, AuditRow, Trend
from s2d.audit.hooks import MaskOf, batches_twice, unreadable, watching, with_progress
from s2d.audit.massive_tokens import MassiveTokens
from s2d.audit.rounded_copy import propagated_errors
from s2d.errors import InputError
from s2d.io.files import JSON
from s2d.io.provenance import run_metadata
from s2d.models import Family, family_of, fingerprint
from s2d.models.graph import Graph
from s2d.models.stack_products import stacks_of
from s2d.models.tracing import trace, unwrapped
from s2d.quant.modules.sites import refuse_quantized
from s2d.quant.spec import QuantSpec, TensorSpec
from s2d.spectral.statistics import OUTLIER_FRACTION
from s2d.spectral.svd import singular_values, top_singular_many
from s2d.spectral.triplets import Triplets
from s2d.targets.calls import projection_of
from s2d.targets.stacked import StackTarget
from s2d.targets.weights import Kind, Selector, Target, clean_name, find_targets

# The paper's selection: the smallest k <= 3 whose PCDR_k reaches tau = 0.95 (arXiv 2602.14432).
THRESHOLD = 0.95
MAX_RANK = 3
# From this ratio on, half a step of a symmetric 4-bit grid (largest / 7) exceeds the RMS: a typical value becomes 0.
OUTLIER_RATIO = 14.0
# Histograms are kept for this many of the worst inputs, and for the inputs of this many of the worst outputs.
PICTURED = 12
_UNFOLLOWED = "several matrices in one parameter, whose products cannot be followed"

Rule = Literal["weight", "data"]


def audit(
    model: nn.Module,
    batches: Iterable[Any],
    *,
    include: Selector = "all-linear",
    exclude: Selector = (),
    kinds: Sequence[Kind] = ("linear", "conv"),
    mask: MaskOf | None = None,
    k: int = 3,
    spec: str | Mapping[str, Any] | QuantSpec = "w4a4",
    max_batches: int | None = None,
    propagation: bool = False,
    progress: bool = False,
    name: str | None = None,
) -> Audit:
    """Measure every weight: its spectrum, its outliers, the components that make them, and the error of low bits.

    The model is not changed: it runs in evaluation mode without gradients, and afterwards every module is as it was.

    Args:
        model: Any module: plain, compiled, or wrapped by DDP.
        batches: Dicts of keyword arguments for ``model(**batch)``, tensors, or tuples of positional arguments; read
            twice. A generator cannot be read twice, so what it gives is held in memory. Tokens that a batch's
            ``attention_mask`` hides do not count.
        include: Which weights; see `s2d.targets.find_targets`.
        exclude: Which weights are left out.
        kinds: ``"linear"``, ``"conv"`` or both.
        mask: Gives a batch's mask ``[batch, tokens]``, true for real tokens, where that is not ``attention_mask``.
        k: How many leading components.
        spec: Bits of the quantization error; ranges as in `s2d.quant.quantize`. Overrides are ignored.
        max_batches: Use at most this many batches.
        propagation: Also quantize a copy as a whole, and say how large its error is behind every block
            (`s2d.audit.rounded_copy`); it takes about as long again.
        progress: Show progress bars.
        name: The model's name in tables and files; its class by default.

    Returns:
        One row per weight, in the model's order; of the experts that share a parameter, the row of the one with the
        largest output over RMS.

    Raises:
        InputError: No module, no weights, no batches, a batch that does not fit the model, NaN or Inf in a weight or
            an activation (named), an impossible setting.
    """
    start = time.perf_counter()
    parsed = _spec(spec)
    if isinstance(model, nn.Module) and any(parameter.ndim == 3 for parameter in model.parameters()):
        batches = batches_twice(batches, max_batches)
        graph, stacks = _stacks(model, batches)
    else:
        graph, stacks = None, []
    targets = _targets(model, include, exclude, kinds, k, stacks)
    source = batches_twice(batches, max_batches)
    experts = {target.name: target.experts() for target in targets if isinstance(target, StackTarget)}
    leading: dict[str, Triplets] = {}
    values: dict[str, Tensor] = {}

    def decompose(chosen: Sequence[Target]) -> None:
        leading.update(_leading(chosen, k))
        listed = with_progress(chosen, None, "spectra of the weights", progress)
        values.update({target.name: singular_values(target.matrix()).cpu() for target in listed})

    decompose([target for target in targets if target.name not in experts])
    # Of experts only the worst is decomposed, when it is known; damaged ones are named now.
    _leading([e for group in experts.values() for e in group if not bool(torch.isfinite(e.matrix()).all())], k)
    missed = {target.name: reason for target in targets if (reason := unreadable(target))}
    if graph is not None and include == "all-linear":
        missed |= {name: _UNFOLLOWED for name in _multiplied(graph) if name not in experts}
    readable = [each for t in targets if t.name not in missed for each in experts.get(t.name, [t])]
    surveys = {target.name: Survey(target, parsed) for target in readable}
    family, tokens = family_of(model), MassiveTokens()

    def see(target: Target, x: Tensor, A: Tensor) -> None:
        surveys[target.name].add(x, A)
        if family.modality == "causal-lm":
            tokens.add(target.name, x)

    with watching(model, readable, see, mask, graph) as feed:
        batches_seen = with_progress(source, max_batches, "looking at activations, 1 of 2", progress)
        count = feed(tokens.noting(batches_seen))
    if count == 0:
        raise InputError("the audit was given no batches; give at least one")
    shown = {name: _worst(surveys, group) for name, group in experts.items()}  # one expert of each stack
    for stack, group in experts.items():
        unseen = [str(each.expert) for each in group if surveys[each.name].rows == 0]
        if len(unseen) == len(group):
            missed[stack] = "no token reached its experts, or their products cannot be followed"
        elif unseen:
            missed[f"{stack}[{', '.join(unseen)}]"] = "no token reached these experts"
    looked = [shown.get(target.name, target) for target in targets]
    decompose(list(shown.values()))
    single = [target.name for target in readable if not isinstance(target, StackTarget)]
    missed |= {name: "no batch reached its module" for name in single if surveys[name].rows == 0}
    reached = [t for t in looked if t.name in surveys and surveys[t.name].rows > 0]
    if not reached:
        reason = f"e.g. {targets[0].name}: {missed[targets[0].name]}"
        raise InputError(f"nothing was seen of the {len(targets)} weights of {type(model).__name__}; {reason}")

    pictured = _pictured([surveys[target.name] for target in reached])
    judgements = {
        target.name: Judgement(surveys[target.name], leading[target.name], k, target.name in pictured)
        for target in with_progress(reached, None, "principal directions", progress)
    }
    with watching(model, reached, lambda target, x, A: judgements[target.name].add(x, A), mask, graph) as feed:
        again = feed(with_progress(source, max_batches, "looking at activations, 2 of 2", progress))
    if again != count:
        raise InputError(f"the batches were {count} and then {again} when read again; give a list or a DataLoader")

    rows = []
    for whole, target in zip(targets, looked, strict=True):
        row = _row(target, family, leading[target.name], values[target.name])
        if isinstance(target, StackTarget):
            row.weight, row.expert, row.experts = whole.name, target.expert, len(experts[whole.name])
        if target.name in judgements:
            _fill(row, surveys[target.name], judgements[target.name])
            row.carriers = tokens.record(target.name)
        rows.append(row)
    propagated = propagated_errors(model, islice(source, max_batches), parsed) if propagation else {}
    for row in rows:
        row.propagated = next((R for block, R in propagated.items() if row.weight.startswith(f"{block}.")), None)
    details = run_metadata(
        fingerprint=fingerprint(model),
        family=family.name,
        spec=str(parsed),
        ranges={"weight": _ranges(parsed.weight), "activation": _ranges(parsed.activation)},
        k=k,
        threshold=THRESHOLD,
        outlier_ratio=OUTLIER_RATIO,
        outlier_fraction=OUTLIER_FRACTION,
        **({"propagated": propagated} if propagation else {}),
        batches=count,
        tokens=max(survey.rows for survey in surveys.values()),
        seconds=round(time.perf_counter() - start, 2),
    )
    return Audit(rows, name or type(getattr(model, "_orig_mod", model)).__name__, details, missed)


def audit_many(
    models: Mapping[str, nn.Module] | Iterable[tuple[str, nn.Module]], batches: Iterable[Any], **settings: Any
) -> Trend:
    """Audit several checkpoints on the same batches.

    Args:
        models: By label, in the order of training. An iterable of ``(label, model)`` may load each model when it is
            asked for, so that only one is in memory.
        batches: See `audit`.
        settings: Settings of `audit`, the same for all.

    Raises:
        InputError: As `audit`; no checkpoint; two with one label.
    """
    source = batches_twice(batches, settings.get("max_batches"))
    audits: dict[str, Audit] = {}
    pairs = models.items() if isinstance(models, Mapping) else models
    for label, model in cast("Iterable[tuple[str, nn.Module]]", pairs):
        if label in audits:
            raise InputError(f"two checkpoints are called {label!r}; give them different labels")
        options: dict[str, Any] = {"name": label, **settings}
        audits[label] = audit(model, source, **options)
    if not audits:
        raise InputError("there is no checkpoint to audit; give at least one")
    return Trend(audits)


def select(
    pcdr: Sequence[float], pcdr_data: Sequence[float], output_ratio: float
) -> tuple[Rule, int] | tuple[None, None]:
    """Decide whether few components make a weight's outliers, by which rule, and how many components.

    - ``"weight"``: the paper's rule, the smallest k <= 3 with PCDR_k >= 0.95, over the singular components of W.
    - ``"data"``: the same rule over the principal directions of the outputs, where the outputs hold outliers that a
      4-bit grid cannot represent (largest over RMS at least 14, see `OUTLIER_RATIO`). The inputs need not excite the
      leading singular vectors of W: in a language model, a weight whose PCDR_3 is 0.04 makes outputs of 500 times the
      RMS along a single direction. The condition is needed because healthy outputs are often of low rank too.

    Args:
        pcdr: PCDR_1..k of the singular components.
        pcdr_data: PCDR_1..k of the principal directions.
        output_ratio: Largest output over the RMS of all.

    Returns:
        The first rule that holds, and k; ``(None, None)`` where neither does.
    """
    rules: list[tuple[Rule, Sequence[float]]] = [("weight", pcdr)]
    if output_ratio >= OUTLIER_RATIO:
        rules.append(("data", pcdr_data))
    for rule, shares in rules:
        for components, share in enumerate(shares[:MAX_RANK], 1):
            if share >= THRESHOLD:
                return rule, components
    return None, None


def _spec(spec: str | Mapping[str, Any] | QuantSpec) -> QuantSpec:
    parsed = QuantSpec.parse(spec)
    if parsed.weight is None and parsed.activation is None:
        raise InputError(f"{parsed} keeps everything at full precision: there is no error to measure; use e.g. w4a4")
    return parsed


def _stacks(model: nn.Module, batches: Iterable[Any]) -> tuple[Graph | None, list[Target]]:
    """The graph of the first batch, and the stacks of matrices in it; nothing where the batch does not run."""
    try:
        graph = trace(model, next(iter(batches)))
    except InputError:  # the batch's own run reports what is wrong with it
        return None, []
    inner = unwrapped(model)
    return graph, [
        StackTarget(s.parameter, s.owner, inner.get_submodule(s.owner), s.name, None, "linear", summed=s.summed)
        for s in stacks_of(graph)
        if type(inner.get_parameter(s.parameter).data) is Tensor
    ]


def _multiplied(graph: Graph) -> list[str]:
    """The parameters of three dimensions that are multiplied, or looked up by number, as experts may be."""
    calls = [call for call in graph.calls if call.kind in ("product", "lookup")]
    shapes = {name: shape for names, shape in zip(graph.names, graph.shapes, strict=True) for name in names}
    return list(dict.fromkeys(call.parameter for call in calls if len(shapes[call.parameter]) == 3))


def _worst(surveys: Mapping[str, Survey], experts: Sequence[StackTarget]) -> StackTarget:
    """The expert with the largest output over RMS; without any tokens the first one."""
    return max(experts, key=lambda target: surveys[target.name].output_ratio if surveys[target.name].rows else -1.0)


def _targets(
    model: nn.Module, include: Selector, exclude: Selector, kinds: Sequence[Kind], k: int, stacks: Sequence[Target]
) -> list[Target]:
    if not isinstance(model, nn.Module):
        raise InputError(f"audit needs a torch module, not {type(model).__name__}; load the model first")
    if isinstance(k, bool) or not isinstance(k, int) or k < 1:
        raise InputError(f"k={k!r} is out of range; it must be a whole number, at least 1")
    for kind in kinds:
        if kind in ("embedding", "norm"):
            raise InputError(f"kinds={kind!r}: such a weight multiplies no activations; use linear, conv or both")
    refuse_quantized(model)
    found = find_targets(model, include, exclude, kinds, stacks)
    order = {clean_name(name): place for place, (name, _) in enumerate(model.named_modules())}
    return sorted(found, key=lambda t: order.get(t.module_name, 0)) if stacks else found


def _leading(targets: Sequence[Target], k: int) -> dict[str, Triplets]:
    """The k leading triplets of each weight, or as many as it has."""
    groups: dict[int, list[Target]] = {}
    for target in targets:
        groups.setdefault(min(k, *target.matrix().shape), []).append(target)
    found: dict[str, Triplets] = {}
    for count, group in groups.items():
        names = [target.name for target in group]
        triplets = top_singular_many([target.matrix() for target in group], count, names=names)
        found.update(zip(names, triplets, strict=True))
    return found


def curve(values: Tensor, points: int = 64) -> JSON:
    """A spectrum as a few points: every rank at first, then ranks in even ratios up to the last one.

    Args:
        values: ``[n]``, largest first.
        points: How many at most.

    Returns:
        ``rank`` (from 1 on, increasing) and ``sigma``, to four digits.
    """
    ranks = sorted({round(len(values) ** (step / (points - 1))) for step in range(points)} | {1, len(values)})
    return {"rank": ranks, "sigma": [float(f"{values[rank - 1].item():.4g}") for rank in ranks]}


def _pictured(surveys: Sequence[Survey]) -> set[str]:
    outputs = sorted(surveys, key=lambda survey: survey.output_ratio, reverse=True)[:PICTURED]
    inputs = sorted(surveys, key=lambda survey: survey.input_ratio, reverse=True)[:PICTURED]
    return {survey.target.name for survey in (*outputs, *inputs)}


def _row(target: Target, family: Family, triplets: Triplets, values: Tensor) -> AuditRow:
    """The fields that depend on the weight alone."""
    W, largest, median = target.matrix(), triplets.S[0].item(), values.median().item()
    return AuditRow(
        weight=target.name,
        kind=target.kind,
        shape=list(W.shape),
        depth=target.depth,
        role=_role(family, target),
        sigma=triplets.S.tolist(),
        sigma_over_median=largest / median if median > 0 else None,
        stable_rank=(torch.linalg.vector_norm(W.to(triplets.S.dtype)).item() / largest) ** 2 if largest > 0 else 0.0,
        spectrum=curve(values),
    )


def _fill(row: AuditRow, survey: Survey, judgement: Judgement) -> None:
    """The fields that depend on the data."""
    row.input_max, row.input_ratio = survey.input_max, survey.input_ratio
    row.output_max, row.output_ratio = survey.output_max, survey.output_ratio
    row.pcdr, row.pcdr_data = judgement.pcdr, judgement.pcdr_data
    row.selected_by, row.components = select(judgement.pcdr, judgement.pcdr_data, survey.output_ratio)
    row.selected = row.selected_by is not None
    row.error, row.histogram = judgement.error, judgement.histogram


def _role(family: Family, target: Target) -> str | None:
    role = family.role(target.module_name)
    if role == "qkv" and (target.rows is not None or target.parameter_name != "weight"):
        return "qkv"[projection_of(target)]
    return role


def _ranges(group: TensorSpec | None) -> str:
    return "kept" if group is None else f"{group.format.name} per {group.granularity}, {group.observer}"
