"""The summary of the numbers: groups, paired differences, and a verdict whose sentences are computed from records."""

from __future__ import annotations

import math
import re
import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from s2d.report.formatting import MISSING, percent, points, ratio, signed

if TYPE_CHECKING:
    from s2d.report.schema import Audit, Record, Weight

# Student's t, two-sided 95 %, for 1, 2, … degrees of freedom: with three seeds a mean is far less certain than 2 SE.
_STUDENT = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
LABELS = {"none": "as published", "adamw": "AdamW", "s2d": "AdamW + S2D"}


def label(conditioning: str) -> str:
    """The display name of a conditioning."""
    name, found, rest = conditioning.partition(" (")
    return LABELS.get(conditioning, f"S2D ({rest}" if found and name == "s2d" else conditioning)


@dataclass(frozen=True)
class Group:
    """The records that may be compared: one task, one model, one metric."""

    task: str
    model: str
    metric: str
    records: tuple[Record, ...]

    @property
    def higher_is_better(self) -> bool:
        """Whether a larger value is the better one."""
        return self.records[0].higher_is_better

    @property
    def unit(self) -> str:
        """The unit of a difference: points of a score; empty for a loss or a perplexity."""
        return " points" if self.higher_is_better else ""

    @property
    def specs(self) -> list[str]:
        """The bit widths from the widest to the narrowest."""
        return sorted(dict.fromkeys(record.spec for record in self.records), key=_width, reverse=True)

    @property
    def conditionings(self) -> list[str]:
        """Published weights first, then AdamW, then the decays, each once."""
        found = dict.fromkeys(record.conditioning for record in self.records)
        order = {"none": 0, "adamw": 1, "s2d": 2}
        return sorted(found, key=lambda name: order.get(name, 3))

    @property
    def quantizers(self) -> list[str]:
        """Method and observer of the quantized records, each once."""
        return list(dict.fromkeys(record.quantizer for record in self.records if record.quantizer))

    def values(self, conditioning: str, spec: str, quantizer: str | None = None) -> list[float]:
        """One value per seed: of one quantizer, or the mean over all where none is named. fp32 has no quantizer."""
        by_seed: dict[str, list[float]] = defaultdict(list)
        for record in self.records:
            asked = quantizer is None or not record.quantizer or record.quantizer == quantizer
            if asked and (record.conditioning, record.spec) == (conditioning, spec) and math.isfinite(record.value):
                by_seed[record.seed].append(record.value)
        return [statistics.fmean(values) for values in by_seed.values()]


@dataclass(frozen=True)
class Gain:
    """How much better one conditioning is than another at one bit width; positive is better, whatever the metric."""

    spec: str
    mean: float
    spread: float | None  # standard deviation over seeds, None for a single seed
    seeds: int
    pairs: int
    before: float
    after: float

    @property
    def clear(self) -> bool:
        """Outside the 95 % interval of the mean over seeds; with a single seed, larger than what rounding shows."""
        if self.spread is None:
            return abs(self.mean) >= 0.05
        bound = _STUDENT[min(self.seeds - 1, len(_STUDENT)) - 1]
        return abs(self.mean) > bound * self.spread / math.sqrt(self.seeds)


def _width(spec: str) -> tuple[float, str]:
    """A sort key: weight bits and activation bits together; unknown formats below the known ones."""
    if found := re.fullmatch(r"[a-z]*fp32|none", spec):
        return (64.0, spec)
    if found := re.search(r"w(\d+)a(\d+)", spec):
        return (float(found[1]) + float(found[2]), spec)
    if found := re.search(r"(\d+)", spec):
        return (2 * float(found[1]), spec)
    return (-1.0, spec)


def groups(records: Iterable[Record]) -> list[Group]:
    """Records by task, model and metric, in order of first appearance. Where test numbers exist, only those."""
    found: dict[tuple[str, str, str], list[Record]] = defaultdict(list)
    for record in records:
        found[record.task, record.model, record.metric].append(record)
    result = []
    for (task, model, metric), members in found.items():
        tested = [record for record in members if record.split in ("test", "")]
        result.append(Group(task, model, metric, tuple(tested or members)))
    return result


def primary(found: Sequence[Group]) -> list[Group]:
    """The first metric of every task and model: the task's own metric."""
    seen: dict[tuple[str, str], Group] = {}
    for group in found:
        seen.setdefault((group.task, group.model), group)
    return list(seen.values())


def rivals(group: Group) -> tuple[str, str] | None:
    """The two compared conditionings: without decay and with it."""
    names = group.conditionings
    without = next((name for name in ("adamw", "none") if name in names), None)
    decayed = "s2d" if "s2d" in names else next((name for name in names if name.startswith("s2d")), None)
    return (without, decayed) if without and decayed else None


def gain(group: Group, spec: str) -> Gain | None:
    """The paired difference at one bit width: same seed, same quantizer; averaged over quantizers, then over seeds."""
    pair = rivals(group)
    if pair is None:
        return None
    sides = [
        {
            (record.seed, record.quantizer): record.value
            for record in group.records
            if record.conditioning == side and record.spec == spec and math.isfinite(record.value)
        }
        for side in pair
    ]
    common = [key for key in sides[0] if key in sides[1]]
    if not common:
        return None
    sign = 1.0 if group.higher_is_better else -1.0
    by_seed: dict[str, list[float]] = defaultdict(list)
    for key in common:
        by_seed[key[0]].append(sign * (sides[1][key] - sides[0][key]))
    per_seed = [statistics.fmean(values) for values in by_seed.values()]
    return Gain(
        spec=spec,
        mean=statistics.fmean(per_seed),
        spread=statistics.stdev(per_seed) if len(per_seed) > 1 else None,
        seeds=len(per_seed),
        pairs=len(common),
        before=statistics.fmean(sides[0][key] for key in common),
        after=statistics.fmean(sides[1][key] for key in common),
    )


def target_spec(group: Group) -> str:
    """The bit width of the verdict: W4A4 where it was measured, else the narrowest."""
    return "w4a4" if "w4a4" in group.specs else group.specs[-1]


@dataclass(frozen=True)
class Verdict:
    """The top of the page: one headline, a few large numbers, a few sentences."""

    headline: str
    tone: str  # "good", "bad" or "plain"
    tiles: tuple[tuple[str, str], ...]
    sentences: tuple[str, ...]


def run_verdict(found: Sequence[Group]) -> Verdict:
    """The verdict of a run: what the decay changed at the narrowest width and at full precision."""
    judged = primary(found)
    tiles: list[tuple[str, str]] = []
    sentences: list[str] = []
    outcomes: list[float] = []
    seeds = 0
    for group in judged:
        where = f"{group.task}, {group.metric}" if len(judged) > 1 else group.metric
        spec = target_spec(group)
        at_target = gain(group, spec)
        if at_target is None:
            sentences += _drop_sentences(group, where)
            continue
        outcomes.append(at_target.mean if at_target.clear else 0.0)
        seeds = max(seeds, at_target.seeds)
        unit = group.unit.strip() or "better (positive) or worse"
        tiles.append((signed(at_target.mean), f"{unit} at {spec.upper()} · {where}"))
        sentences.append(_gain_sentence(group, at_target, where))
        full = gain(group, "fp32") if spec != "fp32" else None
        if full is not None:
            tiles.append((signed(full.mean), f"{unit} at full precision · {where}"))
        sentences += _other_widths(group, spec)
    if not outcomes:
        return Verdict("What each bit width costs", "plain", tuple(tiles), tuple(sentences))
    width = target_spec(judged[0]).upper() + (", on one seed" if seeds == 1 else "")
    if all(outcome > 0 for outcome in outcomes):
        return Verdict(f"S2D helps at {width}", "good", tuple(tiles), tuple(sentences))
    if all(outcome < 0 for outcome in outcomes):
        return Verdict(f"S2D costs accuracy at {width}", "bad", tuple(tiles), tuple(sentences))
    if any(outcomes):
        return Verdict(f"S2D helps at {width} on some tasks only", "plain", tuple(tiles), tuple(sentences))
    return Verdict(f"S2D makes no clear difference at {width}", "plain", tuple(tiles), tuple(sentences))


def _gain_sentence(group: Group, found: Gain, where: str) -> str:
    pair = rivals(group)
    assert pair is not None  # a gain exists
    quantizers = len(group.quantizers)
    over = [f"{found.seeds} seeds" if found.seeds > 1 else "one seed"]
    if quantizers > 1:
        over.append(f"{quantizers} calibrations")
    if found.spread is not None:
        size = f"{signed(found.mean)} ± {points(found.spread)}{group.unit}"
        size += f" (mean and standard deviation over {' and '.join(over)})"
        certainty = "" if found.clear else ", which is within the noise between seeds"
    else:
        size = f"{signed(found.mean)}{group.unit}" + (f" (mean over {' and '.join(over)})" if quantizers > 1 else "")
        certainty = "; a single seed cannot tell this from chance"
    return (
        f"At {found.spec.upper()}, {where} is {points(found.after)} with {label(pair[1])} against "
        f"{points(found.before)} with {label(pair[0])}: {size}{certainty}."
    )


def _other_widths(group: Group, target: str) -> list[str]:
    """One sentence on the remaining bit widths, full precision first."""
    others = [found for spec in group.specs if spec != target and (found := gain(group, spec)) is not None]
    if not others:
        return []
    listed = ", ".join(f"{found.spec.upper()} {signed(found.mean)}" for found in others)
    worse = [found.spec.upper() for found in others if found.spread is not None and found.mean < 0 and found.clear]
    return [f"Elsewhere: {listed}" + (f"; worse by more than noise at {' and '.join(worse)}." if worse else ".")]


def _drop_sentences(group: Group, where: str) -> list[str]:
    """Sentences on the loss through quantizing, where nothing is compared."""
    narrow = target_spec(group)
    sentences = []
    for conditioning in group.conditionings:
        full, low = group.values(conditioning, "fp32"), group.values(conditioning, narrow)
        if full and low and narrow != "fp32":
            sentences.append(
                f"{label(conditioning)}: {where} goes from {points(statistics.fmean(full))} at full precision "
                f"to {points(statistics.fmean(low))} at {narrow.upper()}."
            )
    return sentences


def audit_verdict(audits: Sequence[Audit]) -> Verdict:
    """The verdict of an audit: how many weights make outliers from few singular components, and the worst of them."""
    tiles: list[tuple[str, str]] = []
    sentences: list[str] = []
    for audit in audits:
        suffix = f" · {audit.label}" if len(audits) > 1 else ""
        selected = [weight for weight in audit.weights if weight.selected]
        tiles.append((f"{len(selected)} of {len(audit.weights)}", f"weights selected for decay{suffix}"))
        worst = worst_weight(audit)
        if worst is None:
            continue
        tiles.append((ratio(worst.values["output_ratio"]), f"worst output, largest / RMS{suffix}"))
        sentences.append(_audit_sentence(audit, worst, selected, name=audit.label if len(audits) > 1 else audit.model))
    flagged = [weight for audit in audits for weight in audit.weights if weight.selected]
    if len(audits) > 1:
        return Verdict("How the outliers differ between checkpoints", "plain", tuple(tiles), tuple(sentences))
    if flagged:
        makers = "principal directions" if all(row.selected_by == "data" for row in flagged) else "singular values"
        headline = (
            f"A few {makers} make this model's outliers"
            if len(flagged) > 1
            else "One weight makes this model's outliers"
        )
        return Verdict(headline, "bad", tuple(tiles), tuple(sentences))
    return Verdict("No weight's outliers come from a few components", "good", tuple(tiles), tuple(sentences))


def audit_change(audits: Sequence[Audit]) -> tuple[str, ...]:
    """Sentences on how the outliers differ between the checkpoints of a run, the first one being where it started."""
    if len(audits) < 2:
        return audit_verdict(audits).sentences if audits else ()
    worst, remaining = worst_weight(audits[0]), worst_weight(audits[-1])
    if worst is None or remaining is None:
        return ()
    rows = [(audit.label, audit.weight(worst.name)) for audit in audits]
    ratios = ", ".join(
        f"{ratio(weight.values['output_ratio'])} ({name})"
        for name, weight in rows
        if weight and "output_ratio" in weight.values
    )
    counts = ", ".join(
        f"{sum(weight.selected for weight in audit.weights)} of {len(audit.weights)} ({audit.label})"
        for audit in audits
    )
    sentences = [
        f"The worst outliers, the outputs of {worst.name}, relative to their RMS: {ratios}.",
        f"Weights whose outliers come from a few components: {counts}.",
    ]
    if remaining.name != worst.name:
        size = ratio(remaining.values["output_ratio"])
        sentences.append(f"What stands out most with {audits[-1].label} is {remaining.name}: {size}.")
    return tuple(sentences)


def worst_weight(audit: Audit) -> Weight | None:
    """The weight with the largest output relative to its RMS; a selected one first."""
    measured = [weight for weight in audit.weights if "output_ratio" in weight.values]
    return max(measured, key=lambda weight: (weight.selected, weight.values["output_ratio"]), default=None)


def _audit_sentence(audit: Audit, worst: Weight, selected: Sequence[Weight], name: str) -> str:
    typical = statistics.median(
        weight.values["output_ratio"] for weight in audit.weights if "output_ratio" in weight.values
    )
    text = (
        f"{name}: {worst.name} has the worst outliers; its largest output is {ratio(worst.values['output_ratio'])} "
        f"the RMS (the median weight: {ratio(typical)})"
    )
    if "pcdr_1" in worst.values:
        text += (
            f", and its first singular component makes {percent(min(max(worst.values['pcdr_1'], 0.0), 1.0))} of them"
        )
    if "w4a4_error" in worst.values:
        error = percent(worst.values["w4a4_error"])
        text += f"; quantizing this weight and its input alone to W4A4 changes its typical output channel by {error}"
    by_data = sum(weight.selected_by == "data" for weight in selected)
    if by_data:
        text += (
            f". Of the {len(selected)} selected weights, {by_data} {'is' if by_data == 1 else 'are'} selected by "
            "principal directions of the outputs, the rest by singular components of the weight"
            if by_data < len(selected)
            else ". Selected by principal directions of the outputs, not by singular components of the weight"
        )
    return text + "." + ("" if selected else " None passes the threshold for decay.")


def mean_and_spread(values: Sequence[float]) -> tuple[str, str]:
    """Values of several seeds in a table cell: the mean, and half the range where there is more than one."""
    finite = [value for value in values if math.isfinite(value)]
    if not finite:
        return MISSING, ""
    return points(statistics.fmean(finite)), f"± {points((max(finite) - min(finite)) / 2)}" if len(finite) > 1 else ""
