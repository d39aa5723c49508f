"""How many bits the embedding tables of a file get: 4 where little is lost by it, else 8.

A table is read a row at a time and takes no time, so its bits cost accuracy alone. With a task its score decides: it
may move as far as that of a file may differ from its simulation's. Without one, tables of 4 bits may make the outputs'
error on the example, which quantization has made, a quarter larger.
`s2d.export.export` asks this beside weights of at most 4 bits only.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from s2d.export.copies import shared_copy
from s2d.export.gate import Check, ExportReport, judge_task
from s2d.export.lowering import round_embeddings
from s2d.models.running import main_output
from s2d.quant.modules.record import remove

WIDE, NARROW = 8, 4
GROWTH = 1.25  # of the outputs' error


def table_bits(model: nn.Module, example: Mapping[str, Tensor], check: Check) -> int:
    """The bits for a quantized model's tables.

    Args:
        model: Quantized; left as it is.
        example: A batch of keyword inputs.
        check: Its task, if there is one, is evaluated on its split.
    """
    narrow, wide = shared_copy(model), shared_copy(model)
    if not round_embeddings(narrow, NARROW) or not round_embeddings(wide, WIDE):
        return WIDE
    check.notes(f"comparing embedding tables of {NARROW} and {WIDE} bits")
    if check.task is not None:
        trial = ExportReport("", "", "", NARROW)
        judge_task(trial, wide, narrow, check.task, check)
        return NARROW if trial.passed else WIDE
    plain = remove(shared_copy(model))
    with torch.no_grad():
        exact, at_wide, at_narrow = (main_output(each(**example)).double() for each in (plain, wide, narrow))
    return NARROW if (at_narrow - exact).norm() <= GROWTH * (at_wide - exact).norm() else WIDE
