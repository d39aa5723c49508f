# ruff: noqa: E501
"""Plant an outlier in a gain, a value row and an fc1 row of tiny random models, and let the decay find and shrink it.

One command, offline, CPU; it goes on where it was interrupted, and runs a row again if the code of the decay changed:

    python benchmarks/planted_outliers.py [NAME ...] [--json FILE]

Which weight is planted is told by its name, not by the graph that the decay uses. Its channel is scaled to 10 times the
limit over the RMS of the other channels of its output; the limit is given (`outlier_ratio`), strength 0.1, SGD at 1e-30
with gradients of zero. Weights that write an outlier of the random model's own are not shrunk. After 30 steps the
planted weight must have been selected, be below the limit, and every other number of the model must be bit-equal. Where
one more outlier comes up on the way, a larger limit is taken; the table says which. Exit code 1 if a row fails.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent))
from architectures import rows  # pyright: ignore[reportMissingImports, reportImplicitRelativeImport]

from s2d import SelectiveSpectralDecay
from s2d.errors import InputError
from s2d.io.provenance import code_digest, run_metadata

STEPS, STRENGTH, TIMES, LIMITS = 30, 0.1, 10.0, (4.5, 6.0, 9.0, 14.0)
# Names of modules, the better ones first. What reads the norm is a linear layer of the same block.
PLACES: dict[str, list[str]] = {
    "gain": [
        "input_layernorm",
        "layernorm_before",
        "norm1",
        "ln_1",
        "self_attn_layer_norm",
        "attention.output.LayerNorm",
        "sa_layer_norm",
        "attention.LayerNorm",
        "post_attention_layernorm",
        "layer_norm1",
        "attn_norm",
        "layer.0.layer_norm",
        "attention_layernorm",
        "output.LayerNorm",
        "layernorm_after",
        "layer_norm",
        "layernorm",
        "norm2",
        "norm",
    ],
    "value": [
        "v_proj",
        "value_proj",
        "value",
        "v",
        "v_lin",
        "query_key_value",
        "qkv",
        "qkv_proj",
        "c_attn",
        "Wqkv",
        "kv",
    ],
    "fc1": [
        "fc1",
        "fc1_x",
        "intermediate.dense",
        "intermediate_dense",
        "up_proj",
        "wi",
        "wi_1",
        "lin1",
        "dense_h_to_4h",
        "c_fc",
        "gate_up_proj",
        "ffn",
        "linear1",
        "mlp.Wi",
        "weights_in",
        "pwconv1",
        "up",
    ],
}


def weight_of(model: nn.Module, what: str, batch: Any) -> str | None:
    """The first weight of this kind in the second block, or in any; a gain is one whose channels a layer reads as such.

    A norm that only feeds a sum, or whose channels become tokens, makes no channels of a layer's input by itself.
    """
    places = PLACES[what]
    everything = [(n, p) for n, p in model.named_parameters() if n.endswith(".weight")]
    names: list[str] = []
    for place in places:
        found = [name for name, p in everything if f".{name}".endswith(f".{place}.weight")
                 and (p.ndim == 1 if what == "gain" else p.ndim == 2 or p.shape[2:] == (1, 1))]  # fmt: skip
        owners = [model.get_submodule(name.rpartition(".")[0]) for name in found]
        kinds = (nn.Linear, nn.Conv2d)
        fits = [isinstance(m, kinds) or type(m).__name__ == "Conv1D" or what == "gain" for m in owners]
        inside = [n for n, fit in zip(found, fits, strict=True) if fit and any(p.isdigit() for p in n.split("."))]
        # Where a model has both, those whose channels come last: linear layers read them.
        inside = [n for n in inside if not channels_first(model.get_submodule(n.rpartition(".")[0]))] or inside
        if inside:
            names.append(inside[len(inside) // 2])
    if what == "gain":
        names += [name for name, p in everything if p.ndim == 1 and name not in names]
        return next((name for name in names if is_read(model, name, batch)), names[0] if names else None)
    # Of experts whose gates come first; where gates and values take turns (gpt-oss), the tests plant one.
    stacks = [n for n, p in model.named_parameters() if n.endswith("experts.gate_up_proj") and p.ndim == 3
              and hasattr(model.get_submodule(n.rpartition(".")[0]), "act_fn")]  # fmt: skip
    return names[0] if names else stacks[len(stacks) // 2] if stacks and what == "fc1" else None


@torch.no_grad()
def plant_expert(model: nn.Module, name: str, batch: Any, limit: float) -> int:
    """Scale one row of one expert; which, counted through all experts. A loop over the experts tells what is there."""
    module: Any = model.get_submodule(name.rpartition(".")[0])
    weight, seen = model.get_parameter(name), []
    handle = module.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append((*args, *kwargs.values())), with_kwargs=True
    )
    model.eval()
    run(model, batch)
    model.train()
    handle.remove()
    x, chosen = seen[0][:2]
    made = [
        x.flatten(0, -2)[(chosen.flatten(0, -2) == expert).any(1)] @ weight[expert].mT for expert in range(len(weight))
    ]
    sites = [module.act_fn(gate) * up for gate, up in (y.chunk(2, -1) for y in made)]
    expert = max(range(len(sites)), key=lambda each: len(sites[each]))
    row = weight.shape[1] // 2 + int(sites[expert].abs().amax(0).argmax())
    largest = sites[expert][:, row - weight.shape[1] // 2].abs().max()
    weight[expert, row] *= TIMES * limit * (torch.cat(sites).square().mean().sqrt() / largest).item()
    return expert * weight.shape[1] + row


@torch.no_grad()
def is_read(model: nn.Module, name: str, batch: Any) -> bool:
    """Whether the channel of a gain doubles in what the first layer behind it reads, where all else stays."""
    weight = model.get_parameter(name)
    found = at_site(model, weight, len(weight) // 2, batch, offset_of(weight))
    if found is None:
        return False
    before, after = found
    mine = (before != after).any(0)
    return int(mine.sum()) == 1 and torch.allclose(after[:, mine], 2 * before[:, mine], rtol=1e-4)


def offset_of(weight: Tensor) -> float:
    """1 for Gemma's gains, which are stored less 1."""
    return 1.0 if weight.ndim == 1 and bool((weight == 0).all()) else 0.0


def linear_rows(model: nn.Module, name: str, width: int) -> tuple[int, int]:
    """The first row of a weight that is no gate, query or key, and the one after the last."""
    if re.search(r"qkv|query_key_value|c_attn|Wqkv", name):
        return (width - 4 if "query_key_value" in name else width - width // 3), width  # in NeoX heads take turns
    parent = model.get_submodule(name.rpartition(".")[0].rpartition(".")[0])
    last = getattr(parent, "fc2", None)  # timm's GluMlp: fc1 makes the gate too, and fc2 reads half as many
    if isinstance(last, nn.Linear) and 2 * last.in_features == width:
        return (0, width // 2) if getattr(parent, "gate_last", False) else (width // 2, width)
    return (width // 2 if re.search(r"gate_up|mlp\.Wi|\.kv\.", name) else 0), width


def channels_first(module: nn.Module) -> bool:
    """Whether a module makes ``[B, D, H, W]``."""
    kinds = (nn.Conv2d, nn.GroupNorm, nn.modules.batchnorm._BatchNorm)
    return isinstance(module, kinds) or "2d" in type(module).__name__


def run(model: nn.Module, batch: Any) -> None:
    with torch.no_grad():
        model(**batch) if isinstance(batch, dict) else model(batch)


def step(model: nn.Module, optimizer: torch.optim.Optimizer, batch: Any) -> None:
    """One step of a training in which nothing but the decay moves a number."""
    torch.manual_seed(0)
    run(model, batch)
    optimizer.step()


def output_of(model: nn.Module, module: str, batch: Any) -> Tensor | None:
    """What a module makes ``[N, D]``; None if it is never called."""
    seen: list[Tensor] = []
    handle = model.get_submodule(module).register_forward_hook(lambda *a: seen.append(a[2].detach()))
    run(model, batch)
    handle.remove()
    return seen[0].flatten(0, -2).float() if seen and isinstance(seen[0], Tensor) else None


@torch.no_grad()
def at_site(
    model: nn.Module, rows: Tensor, channel: int, batch: Any, offset: float = 0.0
) -> tuple[Tensor, Tensor] | None:
    """What the first layer reads ``[N, D]`` that a row of a weight changes: as it is, and with that row doubled."""
    seen: list[list[Tensor]] = []

    def note(module: nn.Module, args: Any) -> None:
        if isinstance(args[0], Tensor):
            x = args[0].detach().movedim(1, -1) if channels_first(module) else args[0].detach()
            seen[-1].append(x.flatten(0, -2).double())

    kinds = [m for m in model.modules() if isinstance(m, (nn.Linear, nn.Conv2d)) or type(m).__name__ == "Conv1D"]
    hooks = [module.register_forward_pre_hook(note) for module in kinds]
    kept, training = rows[channel].clone(), model.training
    model.eval()  # some models hide random times by numpy's own numbers
    for factor in (1.0, 2.0):
        rows[channel] = (kept + offset) * factor - offset
        seen.append([])
        torch.manual_seed(0)
        run(model, batch)
    rows[channel] = kept
    model.train(training)
    for hook in hooks:
        hook.remove()
    return next((pair for pair in zip(*seen, strict=True) if not torch.equal(*pair)), None)


@torch.no_grad()
def plant(model: nn.Module, name: str, what: str, batch: Any, limit: float) -> int:
    """Scale one channel of a weight; which."""
    module = model.get_submodule(name.rpartition(".")[0])
    weight = model.get_parameter(name)
    rows = weight.mT if type(module).__name__ == "Conv1D" else weight
    y = output_of(model, name.rpartition(".")[0], batch)
    width = len(rows)
    size = torch.ones(width) if y is None else (y.mean(0).abs() if what == "value" else y.amax(0))
    first, end = linear_rows(model, name, width)
    channel = first + int(size[first:end].argmax())
    others = torch.arange(width) != channel
    site = at_site(model, rows, channel, batch) if what == "value" else None
    if site is not None:  # attention averages values: its own output tells how large the channel is
        x, mine = site[0], (site[0] != site[1]).any(0)
        factor = TIMES * limit * (x[:, ~mine].square().mean().sqrt() / x[:, mine].abs().max()).item()
    elif y is None:
        norms = torch.linalg.vector_norm(rows.reshape(width, -1), dim=1)
        factor = TIMES * limit * (norms[others].mean() / norms[channel]).item()
    else:
        factor = TIMES * limit * (y[:, others].square().mean().sqrt() / y[:, channel].abs().max()).item()
    offset = offset_of(weight)
    rows[channel] = (rows[channel] + offset) * factor - offset
    bias: Tensor | None = getattr(module, "bias", None)
    if bias is not None:
        bias[channel] *= factor
    return channel


class LeavingOut(SelectiveSpectralDecay):
    """A decay that does not shrink what writes a random model's own outliers."""

    own: set[str]

    def shrink(self, target: Any, *rest: Any) -> None:
        """As always, or nothing."""
        if target.name not in self.own:
            super().shrink(target, *rest)


def condition(make: Any, batch: Any, what: str, limit: float) -> dict[str, Any]:
    """One planted outlier."""
    torch.manual_seed(0)
    try:
        model = make().train()
    except Exception as error:  # an older library, or one that lacks a part
        told = (str(error).splitlines() or [""])[0]
        return {"weight": None, "ok": None, "why": f"cannot be built here: {type(error).__name__}: {told[:100]}"}
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "layerdrop"):
            module.layerdrop = 0.0  # type: ignore[assignment]
    name = weight_of(model, what, batch)
    if name is None:
        return {"weight": None, "ok": None, "why": "no weight of such a name"}
    if channels_first(model.get_submodule(name.rpartition(".")[0])):
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
        decay = SelectiveSpectralDecay(model, optimizer, outlier_ratio=limit)
        step(model, optimizer, batch)
        decay.remove()
        told = decay.without_site.get(name)  # not conditioned: it must be listed
        if told is None and name not in {target.name for target in decay.targets}:
            told = "a convolution: no target of the default kinds"
        return {"weight": name, "ok": None, "why": told or "it has a site; channels first are not planted here"}
    stacked = model.get_parameter(name).ndim == 3
    channel = plant_expert(model, name, batch, limit) if stacked else plant(model, name, what, batch, limit)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-30)
    settings: dict[str, Any] = {"outlier_ratio": limit, "refresh_every": 5}
    try:
        natural = SelectiveSpectralDecay(model, optimizer, strength=0.0, **settings)
        step(model, optimizer, batch)
        natural.remove()
        own = {n for n in natural.selected if n.partition("[")[0] != name}
        decay = LeavingOut(model, optimizer, strength=STRENGTH, **settings)
        decay.own = own
    except InputError as error:
        return {"weight": name, "ok": None, "why": str(error)[:100]}
    for _ in range(STEPS + 1):
        step(model, optimizer, batch)
    decay.remove()
    history = [row for row in decay.history if re.sub(r"\[.*", "", row["weight"]) == name]
    ratios = [row["outlier_ratio"] for row in history]
    bias = re.sub(r"weight$", "bias", name)
    changed = []
    for n, p in model.named_parameters():
        here = before[n]
        if n == name:
            conv1d = type(model.get_submodule(n.rpartition(".")[0])).__name__ == "Conv1D"
            p, here = (p.mT, here.mT) if conv1d else (p, here)
            p, here = (p.flatten(0, 1), here.flatten(0, 1)) if stacked else (p, here)
        same = (
            torch.tensor([torch.equal(a, b) for a, b in zip(p, here, strict=True)]) if p.ndim else torch.equal(p, here)
        )
        if n in (name, bias) and isinstance(same, Tensor):
            same[channel] = True
        if not bool(torch.as_tensor(same).all()):
            changed.append(n)
    row: dict[str, Any] = {
        "weight": name,
        "channel": channel,
        "limit": limit,
        "natural": len(own),
        "others_changed": changed[:3],
    }
    if not history:
        skipped = next(
            (why for n, why in decay.skipped.items() if n.startswith(name)), "no site is written by it alone"
        )
        return {**row, "ok": False, "why": skipped}
    chosen = max(row["selected"] for row in history) > 0
    # A fused weight has a site for each of its parts: the last one seen of each counts.
    last = {row["weight"]: row for row in history}
    done = all(row["selected"] == 0 for row in last.values())
    ok = chosen and done and not changed
    why = "" if ok else "not selected" if not chosen else "still selected" if not done else "others changed"
    return {
        **row,
        "first_ratio": round(max(ratios[:3]), 2),
        "last_ratio": round(max(r["outlier_ratio"] for r in last.values()), 2),
        "ok": ok,
        "why": why,
    }  # noqa: E501


def look(make: Any, batch: Any) -> dict[str, Any]:
    """A row of the table: each kind, at the smallest limit at which no natural outlier is in the way."""
    found = {}
    for what in PLACES:
        tries = []
        for limit in LIMITS:
            tries.append(condition(make, batch, what, limit))
            if tries[-1]["ok"] is not False:
                break
        row = next((one for one in tries if one["ok"] is not False), tries[0])
        found[what] = row
    return found


def records(found: dict[str, Any]) -> list[dict[str, Any]]:
    """One of each planted outlier; its value is the site's last ratio over the limit, so below 1 where all is well."""
    return [
        {
            "task": "planted outliers",
            "conditioning": "s2d",
            "spec": what,
            "model": name,
            "metric": what,
            "value": one["last_ratio"] / one["limit"] if one["ok"] else None,
            **one,
        }
        for name, row in found.items()
        for what, one in row.items()
    ]


def rows_of(content: dict[str, Any]) -> dict[str, Any]:
    """What `records` was made from."""
    found: dict[str, Any] = {}
    for one in content["records"]:
        kept = {
            key: value
            for key, value in one.items()
            if key not in ("task", "conditioning", "spec", "model", "metric", "value")
        }
        found.setdefault(one["model"], {})[one["metric"]] = kept
    return found


def main() -> int:
    """Print the table; 1 if a row fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="only these (a part of a name)")
    parser.add_argument("--json", type=Path, help="the rows; those that are in it and of the same code are kept")
    options = parser.parse_args()
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    code = code_digest("decay", "models", "targets", "spectral", "distributed")
    found: dict[str, Any] = {}
    if options.json and options.json.exists():
        saved = json.loads(options.json.read_text())
        found = rows_of(saved) if saved["run"].get("code") == code else {}
    for name, make, batch in rows():
        if name in found or (options.names and not any(part in name for part in options.names)):
            continue
        started = time.process_time()
        try:
            found[name] = look(make, batch)
        except Exception as error:  # one architecture must not hide the others
            line = f"{type(error).__name__}: {str(error).splitlines()[0][:120] if str(error) else ''}"
            found[name] = {what: {"weight": "?", "ok": False, "why": line} for what in PLACES}
        said = "; ".join(f"{what} {'ok' if row['ok'] else row['why']}" for what, row in found[name].items())
        print(f"{name:34} {time.process_time() - started:5.1f} s  {said}", flush=True)
        if options.json:
            content = {"run": run_metadata(code=code), "records": records(found)}
            options.json.write_text(json.dumps(content, indent=1) + "\n")
    failed = sum(one["ok"] is False for row in found.values() for one in row.values())
    passed = sum(one["ok"] is True for row in found.values() for one in row.values())
    print(f"{len(found)} architectures: {passed} outliers below the limit, {failed} not")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
