"""GPTQModel: GPTQ for decoders that it knows; it reads and writes folders."""

from __future__ import annotations

from peers.contract import Job, way
from torch import nn

PACKAGE = "gptqmodel"


def _quantized(job: Job, group: int) -> nn.Module:
    from gptqmodel import GPTQModel, QuantizeConfig  # pyright: ignore[reportMissingImports]

    whole = hasattr(job.model, "lm_head")  # else the encoder inside a task's model
    (job.model if whole else job.inner).save_pretrained(job.folder / "plain")
    made = GPTQModel.load(str(job.folder / "plain"), QuantizeConfig(bits=4, group_size=group), device="cpu")
    made.quantize([{name: value[0] for name, value in batch.items()} for batch in job.inputs], batch_size=1)
    made.save(str(job.folder / "made"))
    read = GPTQModel.load(str(job.folder / "made"), device="cpu").model
    return read.eval() if whole else job.replace(read)


@way("w4a16", "int4 in groups of 128, GPTQ")
def w4(job: Job) -> nn.Module:
    """Its defaults."""
    return _quantized(job, 128)


@way("w4a16", "int4 in groups of 32, GPTQ")
def w4_group(job: Job) -> nn.Module:
    """The groups of the other libraries."""
    return _quantized(job, 32)
