"""compressed-tensors: a folder that transformers and servers such as vLLM load.

``config.json`` says how the layers are quantized; ``model.safetensors`` holds packed codes and scales under the model's
own names. Weights alone and weights of up to 4 bits are ``pack-quantized`` (int32 words), 8-bit weights with rounded
inputs ``int-quantized`` (int8). Unsigned activations are written as signed codes with a zero point: the same grid.
Layers of FP8, MXFP4, MXFP8 and NVFP4 are in `float_layers`.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.export.float_layers import FloatLayer, float_layer
from s2d.export.integers import IntegerActivation
from s2d.export.plain_layers import PlainLayer, plain_layers, refuse_more_than_linears
from s2d.models.quiet import quiet
from s2d.models.saved import describe, save_parts
from s2d.optional import require
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.numerics.quantizer import Quantizer

NAME = "compressed-tensors"


def check(model: nn.Module, embeddings: int) -> int:
    """Refuse, before any work, a model that the format cannot hold.

    Returns:
        0: embedding tables stay as they are.

    Raises:
        InputError: The format cannot hold a layer; the message gives the reason and the nearest spec.
    """
    require("compressed_tensors", "compressed-tensors")
    for layer in _layers(model):
        if isinstance(layer, PlainLayer):
            _refuse_symmetric(layer)
    return 0


def write(model: nn.Module, folder: Path, *, embeddings: int, tokenizer: Any) -> None:
    """Write a quantized transformers model.

    Args:
        model: Checked.
        folder: Made anew.
        embeddings: Not used by this format.
        tokenizer: Kept in the folder.
    """
    require("compressed_tensors", "compressed-tensors")
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

    config: Any = model.config
    tensors = _plain_state(model)
    schemes: dict[str, list[str]] = {}
    for layer in _layers(model):
        args = layer.scheme() if isinstance(layer, FloatLayer) else _scheme(layer)
        schemes.setdefault(json.dumps(args, sort_keys=True), []).append(layer.name)
        tensors.pop(f"{layer.name}.weight")
        if isinstance(layer, FloatLayer):
            tensors |= layer.tensors()
            continue
        codes, scale = layer.weight.codes, layer.weight.scale
        if args["format"] == "int-quantized":
            tensors[f"{layer.name}.weight"] = codes.contiguous()
        else:
            tensors[f"{layer.name}.weight_packed"] = pack_to_int32(codes, layer.bits)
            tensors[f"{layer.name}.weight_shape"] = torch.tensor(codes.shape)
        rows = scale if scale.ndim == 2 else scale.expand(len(codes)).unsqueeze(1)
        tensors[f"{layer.name}.weight_scale"] = rows.contiguous()
        if layer.activation is not None and not layer.activation.dynamic:
            tensors |= _static_input(layer.name, layer.activation)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    settings = json.loads((folder / "config.json").read_text())
    settings["architectures"] = [type(model).__name__]
    settings["quantization_config"] = _config(schemes, model)
    (folder / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
    save_parts(folder, tokenizer, None)


def read(folder: Path, like: nn.Module) -> nn.Module:
    """The folder as transformers and compressed-tensors load it.

    Args:
        folder: From `write`.
        like: The model that was written.
    """
    transformers = require("transformers", "hf")
    from compressed_tensors.offload import disable_onloading

    about = describe(like)
    kind = getattr(transformers, about["class"])
    with quiet(transformers):
        found = kind.from_pretrained(folder, dtype=torch.float32, **about["arguments"]).eval()
    found.hf_quantizer.compressor.decompress_model(found)  # otherwise this happens in the model's first call
    with disable_onloading():
        for module in found.modules():
            if isinstance(module, nn.Linear) and module.weight.dtype != torch.float32:  # blocks come in bfloat16
                module.weight = nn.Parameter(module.weight.float(), requires_grad=False)
    return found


def _layers(model: nn.Module) -> Iterator[PlainLayer | FloatLayer]:
    """The quantized Linears, one at a time: first those with floating-point codes, then those with integers."""
    refuse_more_than_linears(model, NAME)
    floats = set()
    for name, module in model.named_modules():
        layer = float_layer(name, module) if isinstance(module, QuantizedLinear) else None
        if layer is not None:
            floats.add(name)
            yield layer
    yield from plain_layers(model, NAME, floats)


def _refuse_symmetric(layer: PlainLayer) -> None:
    if layer.activation is not None and layer.activation.format.signed:
        raise InputError(
            f"{layer.name}: symmetric activations have one code more in {NAME}; the nearest spec that it can hold has "
            f"unsigned ones: activation: {{bits: {layer.activation.format.bits}}}"
        )


def _static_input(name: str, activation: IntegerActivation) -> dict[str, Tensor]:
    assert activation.scale is not None and activation.zero_point is not None
    half = 2 ** (activation.format.bits - 1)
    zero_point = (activation.zero_point - half).to(torch.int8).reshape(1)
    return {f"{name}.input_scale": activation.scale.reshape(1).clone(), f"{name}.input_zero_point": zero_point}


def _scheme(layer: PlainLayer) -> dict[str, Any]:
    """The quantization of one layer, as the format describes it."""
    weights: dict[str, Any] = {"num_bits": layer.bits, "type": "int", "symmetric": True, "strategy": "channel"}
    if layer.weight.granularity == "group":
        weights |= {"strategy": "group", "group_size": layer.run}
    inputs = None
    if layer.activation is not None:
        token = layer.activation.dynamic
        bits = layer.activation.format.bits
        strategy = "token" if token else "tensor"
        inputs = {"num_bits": bits, "type": "int", "symmetric": False, "strategy": strategy, "dynamic": token}
    packed = layer.bits < 8 or inputs is None
    return {
        "weights": weights,
        "input_activations": inputs,
        "format": "pack-quantized" if packed else "int-quantized",
    }


def _config(schemes: dict[str, list[str]], model: nn.Module) -> dict[str, Any]:
    """The ``quantization_config``: one group for layers of one scheme."""
    from compressed_tensors.quantization import QuantizationConfig, QuantizationScheme

    groups, formats = {}, set()
    for index, (text, names) in enumerate(schemes.items()):
        args = json.loads(text)
        formats.add(args["format"])
        # Servers fuse layers and match them by class; only where schemes differ are layers matched by name.
        groups[f"group_{index}"] = QuantizationScheme(targets=["Linear"] if len(schemes) == 1 else names, **args)
    rounded = {name for names in schemes.values() for name in names}
    ignored = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and name not in rounded]
    made = QuantizationConfig(
        config_groups=groups,
        format=formats.pop() if len(formats) == 1 else "mixed-precision",
        quantization_status="compressed",  # pyright: ignore[reportArgumentType]
        ignore=ignored,
    )
    return made.model_dump(mode="json")


def _plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state of the model without its quantizers, shared tensors under their first name only."""
    prefixes = tuple(f"{name}." for name, each in model.named_modules() if isinstance(each, Quantizer))
    seen: set[int] = set()
    kept = {}
    for key, value in model.state_dict().items():
        if not key.startswith(prefixes) and not (value.numel() and value.data_ptr() in seen):
            seen.add(value.data_ptr())
            kept[key] = value.detach().contiguous()
    return kept
