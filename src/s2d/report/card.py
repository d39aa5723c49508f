"""The model card: README.md beside a saved model, with the numbers that were measured on it.

The front matter is the hub's metadata (https://huggingface.co/docs/hub/model-cards), results as a ``model-index``; the
text below it says what was done, what was measured and how to load the model. Like the page, it is made from results
alone, without torch. Names are untrusted text and are escaped for Markdown and YAML.
"""

from __future__ import annotations

import math
import os
import re
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from s2d.errors import visible
from s2d.io.files import JSON, write_atomic
from s2d.report.formatting import MISSING, points, ratio, signed
from s2d.report.summary import Group, gain, groups, label

NAME = "README.md"
_PAPER = "https://arxiv.org/abs/2602.14432"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# The hub's task of a transformers model, by the task of s2d; the hub lists the model under it.
_PIPELINES = {
    "docstrings": "sentence-similarity",
    "text-classification": "text-classification",
    "image-classification": "image-classification",
    "zero-shot": "zero-shot-image-classification",
    "language-modeling": "text-generation",
}


def write_card(
    folder: str | os.PathLike[str],
    *,
    base: str,
    task: str,
    arm: str = "s2d",
    training: JSON | None = None,
    run: JSON | None = None,
    records: Sequence[JSON] = (),
    name: str | None = None,
) -> Path:
    """Write ``README.md`` into a saved model's folder: complete, or not at all.

    Args:
        folder: Folder of the saved model.
        base: The model that was fine-tuned, as it was named.
        task: What it was fine-tuned on.
        arm: The conditioning of this model, as the records call it.
        training: ``{"steps", "seed", "settings": {...}, "decay": {...} | None, "history": [...]}``, or less.
        run: Versions, data hash and more, as in results files.
        records: Of the run that made the model, in the form of results files; other arms' are shown for comparison.
        name: What the card calls the model; the folder's name by default.

    Returns:
        The path of the card.

    Raises:
        InputError: A record is invalid, or the file cannot be written.
    """
    folder = Path(folder)
    text = card(base=base, task=task, arm=arm, training=training, run=run, records=records, name=name or folder.name)

    def write(file: BinaryIO) -> None:
        file.write(text.encode("utf-8"))

    return write_atomic(folder / NAME, write)


def card(
    *,
    base: str,
    task: str,
    arm: str = "s2d",
    training: JSON | None = None,
    run: JSON | None = None,
    records: Sequence[JSON] = (),
    name: str = "model",
) -> str:
    """The card's text; arguments as for `write_card`."""
    from s2d.report.schema import read_results

    training, run = training or {}, run or {}
    found = groups(read_results({"records": list(records)}).records) if records else []
    trial = run.get("trial") is True
    parts = [
        f"---\n{_front_matter(base, task, arm, name, [] if trial else found)}---",
        f"# {_plain(name)}",
        _opening(base, task, arm, training),
    ]
    if trial:
        parts.append("**Only a trial: its numbers mean nothing.** A tiny random model, a few steps, made-up data.")
    if found:
        parts += ["## Measured", *(_table(group) for group in found), _caveat(found, arm)]
    if outliers := _outliers(training.get("history")):
        parts += ["## Outliers while it was trained", outliers]
    parts += ["## Load it", _loading(), "## How it was made", _details(task, training, run)]
    parts.append(
        f"Made with s2d (Selective Spectral Decay, [arXiv 2602.14432]({_PAPER})). The licence of the base model holds "
        "for this one too."
    )
    return "\n\n".join(parts) + "\n"


def _plain(text: object) -> str:
    """A name as words of Markdown: no markup, no HTML, no new line, no end of a table's cell."""
    escaped = re.sub(r"([\\`*_{}\[\]()#+!|~<>&$])", r"\\\1", visible(" ".join(str(text).split())))
    return escaped.replace("\\<", "&lt;").replace("\\>", "&gt;").replace("\\&", "&amp;")


def _code(text: object) -> str:
    """A name as code; backticks, which would end it, become straight quotes."""
    return f"`{visible(' '.join(str(text).split())).replace('`', chr(39)).replace('|', '¦') or ' '}`"


def _front_matter(base: str, task: str, arm: str, name: str, found: Sequence[Group]) -> str:
    import yaml  # noqa: PLC0415

    tags = ["s2d", "quantization", "outliers"] + (["selective-spectral-decay"] if arm.startswith("s2d") else [])
    content: dict[str, Any] = {"library_name": "s2d", "tags": tags}
    if _HUB_NAME.fullmatch(base) and not Path(base).exists():
        content["base_model"] = base
        content["base_model_relation"] = "finetune"
    if task in _PIPELINES:
        content["pipeline_tag"] = _PIPELINES[task]
    results = [result for group in found if (result := _index(group, arm, task)) is not None]
    if results:
        content["model-index"] = [{"name": visible(name), "results": results}]
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=10_000)


def _index(group: Group, arm: str, task: str) -> dict[str, Any] | None:
    """One group as an entry of the model index: a metric for every bit width and quantizer."""
    metrics = []
    for record in group.records:
        if record.conditioning != arm or not math.isfinite(record.value):
            continue
        how = " ".join(part for part in (record.spec.upper(), record.quantizer) if part)
        seed = f", seed {record.seed}" if record.seed else ""
        simulated = "" if record.spec == "fp32" else ", simulated"
        metrics.append(
            {"type": group.metric, "value": record.value, "name": f"{group.metric} ({how}{simulated}{seed})"}
        )
    if not metrics:
        return None
    split = next((record.split for record in group.records if record.split), "test")
    dataset = {"name": group.task, "type": group.task, "split": split}
    return {"task": {"type": _PIPELINES.get(task, "other")}, "dataset": dataset, "metrics": metrics}


def _opening(base: str, task: str, arm: str, training: JSON) -> str:
    steps = training.get("steps")
    length = f" for {steps} optimizer steps" if isinstance(steps, int) else ""
    what = f"{_code(base)}, fine-tuned on {_plain(task)}{length}"
    decay = training.get("decay")
    if isinstance(decay, Mapping) and decay.get("baseline"):
        return f"{what} with the baseline {_code(decay['baseline'])}, which spectral decay is compared with."
    if arm.startswith("s2d") or decay:
        return (
            f"{what} with **selective spectral decay**: only the components of its weights that make activation "
            "outliers were shrunk, so that low-bit quantizers do better on it. Same architecture, same state dict."
        )
    return f"{what}, without spectral decay ({_plain(label(arm))})."


def _table(group: Group) -> str:
    """Mean over seeds and calibrations of every arm, and the paired gain."""
    heads = [_plain(spec.upper()) for spec in group.specs]
    lines = [f"| {_plain(group.metric)}, {_plain(group.task)} | {' | '.join(heads)} |", "|---|" + "---|" * len(heads)]
    for name in group.conditionings:
        cells = []
        for spec in group.specs:
            values = group.values(name, spec)
            cells.append(points(statistics.fmean(values)) if values else MISSING)
        lines.append(f"| {_plain(label(name))} | {' | '.join(cells)} |")
    gains = [gain(group, spec) for spec in group.specs]
    if any(gains):
        lines.append(f"| gain | {' | '.join(MISSING if one is None else signed(one.mean) for one in gains)} |")
    return "\n".join(lines)


def _caveat(found: Sequence[Group], arm: str) -> str:
    seeds = max(len({record.seed for record in group.records if record.conditioning == arm}) for group in found)
    quantizers = list(dict.fromkeys(name for group in found for name in group.quantizers))
    over = f"Means over {', '.join(map(_plain, quantizers))}. " if len(quantizers) > 1 else ""
    count = "One seed." if seeds < 2 else f"{seeds} seeds."
    return (
        f"{over}{count} Below FP32 the bits are simulated in floating point: values are rounded as an integer kernel "
        "would round them. Compare full precision before you use the model."
    )


def _outliers(history: object) -> str:
    """The largest ratio of an output to its RMS at the first and the last refresh of the decay."""
    if not isinstance(history, (list, tuple)) or not history:
        return ""
    looks: dict[Any, float] = {}
    for moment in history:
        value = moment.get("outlier_ratio") if isinstance(moment, Mapping) else None
        if isinstance(value, (int, float)) and math.isfinite(value):
            looks[moment.get("step")] = max(looks.get(moment.get("step"), 0.0), float(value))
    if len(looks) < 2:
        return ""
    (first, before), *_, (last, after) = looks.items()
    text = (
        f"The largest activation over the RMS of its tensor, worst weight: {ratio(before)} at step {first}, "
        f"{ratio(after)} at step {last}."
    )
    return f"{text} {held}." if (held := held_back(history)) else text


def held_back(history: Sequence[Mapping[str, Any]]) -> str:
    """The share of its strength that the decay's budget allowed, as text; empty where it set no limit."""
    selected = [moment for moment in history if moment.get("selected")]
    paces = [float(pace) for moment in selected if isinstance(pace := moment.get("pace"), int | float)]
    mean = statistics.fmean(paces) if paces else 1.0
    if mean > 0.995:
        return ""
    return f"The decay used {100 * mean:.0f} % of its strength: with more it would have exceeded decay.budget"


def _loading() -> str:
    return (
        "```python\nimport s2d\n\nmodel = s2d.load('.').model  # this folder\n"
        "quantized = s2d.quantize(model, 'w4a4', calibration=batches)\n```\n\n"
        "A plain transformers model is read by `AutoModel.from_pretrained` too. Where a task wrapped it, the part that "
        "transformers knows is `model.encoder`, and `model.encoder.save_pretrained(folder)` writes it on its own."
    )


def _details(task: str, training: JSON, run: JSON) -> str:
    lines = [("task", task)]
    lines += [(key, training[key]) for key in ("steps", "seed") if training.get(key) is not None]
    for part in ("settings", "decay"):
        content = training.get(part)
        if isinstance(content, Mapping):
            lines += [(f"{part}.{key}", value) for key, value in content.items()]
    lines += [(key, run[key]) for key in ("command", "data_hash", "model_fingerprint") if run.get(key)]
    versions = run.get("versions")
    if isinstance(versions, Mapping):
        lines += [(f"versions.{key}", value) for key, value in versions.items()]
    return "\n".join(["| setting | value |", "|---|---|", *(f"| {_plain(k)} | {_code(v)} |" for k, v in lines)])
