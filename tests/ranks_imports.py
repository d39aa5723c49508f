"""What every rank of `tests.ranks` imports; the process that they are forked off imports it for all of them."""

import importlib

import tests.ranks  # noqa: F401

for _name in (
    "pytest",
    "s2d.quant",
    "torch._dynamo",  # by the first collective of a DTensor
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
):
    importlib.import_module(_name)
