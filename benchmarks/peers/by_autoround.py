"""AutoRound: rounding and ranges of weights trained block by block (200 steps of 8 examples, its defaults)."""

from __future__ import annotations

from typing import Any

from peers.contract import Job, even, way
from torch import nn

PACKAGE = "auto_round"


def _tuned(job: Job, group: int, **activations: Any) -> nn.Module:
    from auto_round import AutoRound  # pyright: ignore[reportMissingImports]
    from auto_round.schemes import QuantizationScheme  # pyright: ignore[reportMissingImports]

    examples = even(job.inputs) if "input_ids" in job.inputs[0] else job.inputs
    scheme = QuantizationScheme(bits=4, group_size=group, sym=True, **activations)
    length = examples[0]["input_ids"].shape[1] if "input_ids" in examples[0] else None
    tuner = AutoRound(
        job.inner if length and not hasattr(job.model, "lm_head") else job.model,
        scheme=scheme,
        dataset=examples,
        nsamples=len(examples),
        seqlen=length or 2048,
        device_map="cpu",
    )
    made, _ = tuner.quantize()
    return job.model.eval() if made is job.inner or made is job.model else job.replace(made)


@way("w4a16", "W4A16: int4 in groups of 128")
def w4(job: Job) -> nn.Module:
    """Its preset."""
    return _tuned(job, 128)


@way("w4a16", "int4 in groups of 32")
def w4_group(job: Job) -> nn.Module:
    """The groups of the other libraries."""
    return _tuned(job, 32)
