"""How many bits the embedding tables of a file get: 4 where the model passes the checks of a file with them, else 8.

A table is read a row at a time and takes no time, so its bits cost accuracy alone. The simulated model with tables of 4
bits has to come as near to that with tables of 8 as a file has to come to its simulation: in its outputs on the
example, and with a task in its score. `s2d.export.export` asks this beside weights of at most 4 bits only.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from s2d.export.copies import shared_copy
from s2d.export.gate import Check, ExportReport, judge_output, judge_task
from s2d.export.lowering import round_embeddings

WIDE, NARROW = 8, 4


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
    trial = ExportReport("", "", "", NARROW)
    judge_output(trial, wide, narrow, example)
    if trial.passed and check.task is not None:
        judge_task(trial, wide, narrow, check.task, check)
    return NARROW if trial.passed else WIDE
