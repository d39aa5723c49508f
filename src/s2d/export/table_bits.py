"""How many bits the embedding tables of a file get: 4 where that costs next to nothing beside the rest, else 8.

A table is read a row at a time and takes no time, so its bits cost accuracy alone. With a task, its score at 4 bits
decides; without one, the outputs on the example, against those in full precision: the tables may add a tenth to what
the quantization costs already.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from s2d.export.copies import shared_copy
from s2d.export.gate import POINTS, Check, cosine, score
from s2d.export.lowering import round_embeddings
from s2d.quant.modules.record import remove

WIDE, NARROW = 8, 4
MORE = 0.1  # share of the quantization's own change of the outputs


def table_bits(model: nn.Module, example: Mapping[str, Tensor], check: Check) -> int:
    """The bits for a quantized model's tables.

    Args:
        model: Quantized; left as it is.
        example: A batch of keyword inputs.
        check: Its task, if there is one, is evaluated twice on its split.
    """
    narrow, wide = with_tables(model, NARROW), with_tables(model, WIDE)
    if narrow is None or wide is None:
        return WIDE
    if check.task is not None:
        check.notes(f"comparing {check.task.primary} with embedding tables of {NARROW} and {WIDE} bits")
        lost = score(wide, check.task, check) - score(narrow, check.task, check)
        return NARROW if (lost if check.task.higher_is_better else -lost) <= POINTS else WIDE
    check.notes(f"comparing outputs with embedding tables of {NARROW} and {WIDE} bits")
    with torch.no_grad():
        full = remove(shared_copy(model))(**example)
        change = {bits: 1.0 - cosine(each(**example), full) for bits, each in ((NARROW, narrow), (WIDE, wide))}
    return NARROW if change[NARROW] <= (1.0 + MORE) * change[WIDE] else WIDE


def with_tables(model: nn.Module, bits: int) -> nn.Module | None:
    """A copy with rounded tables; None where there are none to round."""
    made = shared_copy(model)
    return made if round_embeddings(made, bits) else None
