"""What every rank of `tests.ranks` imports; the process that they are forked off imports it for all of them."""

import importlib
import importlib.util

import tests.ranks  # noqa: F401

from s2d.optional import declare_missing_operators

declare_missing_operators()
for _name in (
    "accelerate",
    "pytest",
    "s2d.quant",
    "torch._dynamo",  # by the first collective of a DTensor
    "torch.distributed.checkpoint.state_dict",
    "torch.distributed.fsdp",
    "torch.distributed.tensor.parallel",
    "transformers.models.bert.modeling_bert",
):
    if importlib.util.find_spec(_name.partition(".")[0]):  # extras may be absent
        importlib.import_module(_name)
