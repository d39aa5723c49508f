"""A quantized model on disk: a folder with ``quantization.json`` and one safetensors file that it names.

The safetensors file holds the codes of every quantized weight (``NAME.codes``, two to a byte at 4 bits and below; and
``NAME.blocks``, the scales of the blocks, where the format has them), the quantizers' scales and zero points, and
everything else of the state dict as it is. The JSON, versioned, holds the spec, the plan, the kinds of the quantizers
that are not the plain ones, the shapes of what a method computes beside the model's own weights, and what is needed to
check that the two files and the model belong together.

The tensors are written first, under a name made of their hash; replacing the JSON switches the folder from the old
model to the new one, so an interrupted save leaves the old model complete.
"""

from __future__ import annotations

import copy
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.io.files import in_place_of
from s2d.models.saved import types_of
from s2d.quant.modules import online
from s2d.quant.modules.record import Record, record, remove, switch_on
from s2d.quant.modules.sites import Site, described, insert, refuse_quantized, replace_quantizer, weight_name
from s2d.quant.numerics import log_and_twin  # noqa: F401 - power enters its kinds of quantizers
from s2d.quant.numerics.formats import (
    BlockFormat,
    FloatFormat,
    Format,
    IntFormat,
    float_codes,
    float_values,
    get_format,
    round_float,
)
from s2d.quant.numerics.quantizer import (
    Quantizer,
    WeightQuantizer,
    block_scales,
    build_kind,
    dequantize,
    quantize_codes,
    spread,
    to_blocks,
)
from s2d.quant.numerics.stacks import from_rows, rows_of
from s2d.quant.spec import QuantSpec

VERSION = 1
CONFIG = "quantization.json"


def pack(codes: Tensor, bits: int) -> Tensor:
    """Codes as bytes, flat; codes of up to 4 bits go two to a byte, the first in the low half.

    Args:
        codes: uint8, any shape.
        bits: Width of a code.

    Returns:
        uint8, ``[ceil(n / 2)]`` up to 4 bits, else ``[n]``.
    """
    codes = codes.flatten()
    if bits > 4:
        return codes
    if codes.numel() % 2:
        codes = torch.cat([codes, codes.new_zeros(1)])
    return codes[0::2] | (codes[1::2] << 4)


def unpack(packed: Tensor, bits: int, shape: tuple[int, ...]) -> Tensor:
    """The codes of `pack`, uint8, in their shape."""
    codes = torch.stack([packed & 15, packed >> 4], dim=1).flatten() if bits <= 4 else packed
    return codes[: int(torch.Size(shape).numel())].reshape(shape)


def encode(weight: Tensor, scale: Tensor, zero_point: Tensor, format: Format) -> dict[str, Tensor]:
    """The stored form of a quantized weight: packed ``codes``, and for block formats the scales of the ``blocks``.

    Integer codes are stored with the smallest as 0, floating-point ones as their bits (sign, exponent, mantissa); block
    scales as the bits of their format, or the exponent plus 127.
    """
    if isinstance(format, IntFormat):
        codes = quantize_codes(weight, scale, zero_point, format).to(torch.int16) - format.qmin
        return {"codes": pack(codes.to(torch.uint8), format.bits)}
    if isinstance(format, BlockFormat):
        blocks = to_blocks(weight, format)
        shared = block_scales(blocks, scale, format)
        codes = float_codes(round_float(blocks / (shared * scale), format.element), format.element)
        powers = torch.frexp(shared).exponent + 126
        stored = powers.to(torch.uint8) if format.scale is None else float_codes(shared, format.scale)
        return {"codes": pack(codes.flatten(-2)[..., : weight.shape[-1]], format.bits), "blocks": stored.flatten()}
    assert isinstance(format, FloatFormat)
    return {"codes": pack(float_codes(round_float(weight.float() / scale, format), format), format.bits)}


def decode(
    stored: dict[str, Tensor], shape: tuple[int, ...], scale: Tensor, zero_point: Tensor, format: Format
) -> Tensor:
    """The float32 values of a stored weight; bit-identical to `fake_quantize` of what was encoded."""
    codes = unpack(stored["codes"], format.bits, shape)
    if isinstance(format, IntFormat):
        return dequantize(codes.to(torch.int16) + format.qmin, scale, zero_point)
    if isinstance(format, BlockFormat):
        blocks = to_blocks(float_values(codes, format.element), format)
        if format.scale is None:
            exponents = stored["blocks"].int() - 127
            shared = torch.ldexp(torch.ones(exponents.shape), exponents)
        else:
            shared = float_values(stored["blocks"], format.scale)
        shared = shared.reshape(blocks.shape[:-1]).unsqueeze(-1)
        return (blocks * (shared * scale)).flatten(-2)[..., : shape[-1]]
    assert isinstance(format, FloatFormat)
    return float_values(codes, format) * scale


def save(model: nn.Module, path: str | os.PathLike[str]) -> None:
    """Write a quantized model into the folder ``path`` (made if needed; a model saved there before is replaced).

    Raises:
        InputError: The model is not quantized, or the folder cannot be written.
    """
    record(model)  # refuses an unquantized model before the folder is made
    folder = Path(path)
    with in_place_of(folder / CONFIG) as made:
        write_into(model, made.parent)
    used = _config(folder)["tensors"]
    for stale in folder.glob("weights-*.safetensors"):
        if stale.name != used:
            stale.unlink()


def write_into(model: nn.Module, folder: Path) -> None:
    """Write a quantized model's two files into an empty folder."""
    kept = record(model)
    tensors, codes, aliases = _tensors(model, kept)
    save_file(tensors, folder / "weights")
    name = _file_name(folder / "weights")
    (folder / "weights").rename(folder / name)
    config = {
        "format": "s2d.quantized",
        "version": VERSION,
        "model": type(model).__name__,
        "method": kept.method,
        "spec": kept.spec.to_dict(),
        "sites": [described(site) for site in kept.sites],
        "quantizers": [name for name, module in model.named_modules() if isinstance(module, Quantizer)],
        "kinds": _kinds(model),
        "online": online.describe(model),
        "codes": codes,
        "aliases": aliases,
        "tensors": name,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=1))


def load(path: str | os.PathLike[str], model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Read a quantized model from ``path`` into a plain model of the same architecture; its outputs are bit-identical.

    Weights of quantized sites come back as the values that their codes stand for (the file does not hold the original
    ones), so `remove` then gives a plain model with rounded weights.

    Args:
        path: The folder that `save` wrote.
        model: Built as the saved one was; its weights do not matter.
        inplace: Load into this very model instead of a copy. A failed call leaves it as it was.

    Raises:
        InputError: No such folder, a broken or foreign file, another version, or another model's file.
    """
    folder = Path(path)
    refuse_quantized(model)
    config, state = _read(folder)
    try:
        sites = [_site(entry) for entry in config["sites"]]
        full = _state_dict(config, state)
        # Files of older versions have neither kinds nor online operations.
        beside = config.get("online", {})
        added = tuple(f"{prefix}." for prefix in config["quantizers"])
        added += tuple(f"{module}.{name}" for module, shapes in beside.items() for name in shapes)
        kept = Record(QuantSpec.parse(config["spec"]), config["method"], tuple(sites))
        saved = config["model"]
    except (KeyError, TypeError, AttributeError, RuntimeError):
        raise InputError(f"{folder / CONFIG} does not describe its tensors; save the model again") from None
    _check_model(model, {key: value for key, value in full.items() if not key.startswith(added)}, saved, folder)
    if not inplace:
        model = copy.deepcopy(model)
    quantizers = insert(model, sites)
    try:
        for site, quantizer in _special(config, quantizers).items():
            replace_quantizer(model, site, quantizer)
            quantizer.train(model.training)
        online.attach(model, beside)
        for name, module in model.named_modules():
            if isinstance(module, Quantizer) and module.granularity == "head":
                module.resize(full[f"{name}.scale"].shape)
        if {key: value.shape for key, value in model.state_dict().items()} != {k: v.shape for k, v in full.items()}:
            raise KeyError
    except (KeyError, TypeError, AttributeError, AssertionError, InputError):
        remove(model)
        raise InputError(f"{folder / CONFIG} does not describe its tensors; save the model again") from None
    model.load_state_dict(full)
    switch_on(model, kept)
    return model


def saved_types(folder: Path) -> dict[str, torch.dtype]:
    """The type of every floating-point tensor of a saved model's state dict, quantized weights too."""
    config = _config(folder)
    try:
        found = types_of(folder / Path(config["tensors"]).name)
        found |= {key: getattr(torch, entry["dtype"]) for key, entry in config["codes"].items()}
        return found | {alias: found[key] for alias, key in config["aliases"].items() if key in found}
    except (KeyError, TypeError, AttributeError, OSError, SafetensorError):
        raise InputError(f"{folder} is damaged or was not written by s2d; save the model again") from None


def _tensors(model: nn.Module, kept: Record) -> tuple[dict[str, Tensor], dict[str, dict[str, Any]], dict[str, str]]:
    """What goes into the file.

    Returns:
        The tensors by key; of every weight stored as codes its shape, types and the prefix of its scale; and the keys
        that share another key's tensor.
    """
    state = {key: value.detach() for key, value in model.state_dict().items()}
    first: dict[tuple[Any, ...], str] = {}
    aliases: dict[str, str] = {}
    for key, value in state.items():
        same = (value.data_ptr(), value.shape, value.stride(), value.dtype)
        if value.numel() and first.setdefault(same, key) != key:
            aliases[key] = first[same]
    shared = {*aliases, *aliases.values()}

    modules = model.named_modules()
    quantizers = {module.name: (name, module) for name, module in modules if isinstance(module, WeightQuantizer)}
    codes: dict[str, dict[str, Any]] = {}
    tensors: dict[str, Tensor] = {}
    for site in kept.sites:
        if site.what != "weight" or site.format is None:
            continue
        key = weight_name(model, site)
        # A weight that others use unquantized too (a tied head) is stored as it is.
        if key not in shared:
            prefix, quantizer = quantizers[site.name]
            weight = state[key]
            rows = rows_of(quantizer, weight)
            scale, zero_point = quantizer.parameters_for(rows)
            for part, value in encode(rows, scale, zero_point, site.format).items():
                tensors[f"{key}.{part}"] = value
            entry = {"format": site.format.name, "shape": list(rows.shape), "dtype": _dtype_name(weight)}
            codes[key] = {**entry, "scale": prefix}
            if site.summed:
                codes[key]["stack"] = {"shape": list(weight.shape), "summed": site.summed}
    for key, value in state.items():
        if key not in codes and key not in aliases:
            # Views of one storage under several names are legal in a model, not in a safetensors file.
            tensors[key] = value.clone(memory_format=torch.contiguous_format)
    return tensors, codes, aliases


def _state_dict(config: dict[str, Any], stored: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of the quantized model: weights from their codes, shared tensors under every name."""
    state = dict(stored)
    for key, entry in config["codes"].items():
        parts = {part: state.pop(f"{key}.{part}") for part in ("codes", "blocks") if f"{key}.{part}" in state}
        scale, zero_point = state[f"{entry['scale']}.scale"], state[f"{entry['scale']}.zero_point"]
        format, shape = get_format(entry["format"]), tuple(entry["shape"])
        weight = decode(parts, shape, spread(scale, shape), spread(zero_point, shape), format)
        if "stack" in entry:  # of matrices: what was read are its rows
            weight = from_rows(weight, entry["stack"]["shape"], entry["stack"]["summed"])
        state[key] = weight.to(getattr(torch, entry["dtype"]))
    for alias, key in config["aliases"].items():
        state[alias] = state[key]
    return state


def _kinds(model: nn.Module) -> dict[str, dict[str, Any]]:
    """Kind and options of the quantizers that are not what `insert` puts in, by their site's name."""
    quantizers = (module for module in model.modules() if isinstance(module, Quantizer))
    return {q.name: {"kind": q.kind, "options": q.options()} for q in quantizers if q.kind != Quantizer.kind}


def _special(config: dict[str, Any], quantizers: dict[Site, Quantizer]) -> dict[Site, Quantizer]:
    """The quantizers that `_kinds` noted, built again."""
    by_name = {site.name: site for site in quantizers}
    found = {}
    for name, entry in config.get("kinds", {}).items():
        site = by_name[name]
        assert site.format is not None
        found[site] = build_kind(entry["kind"], site.format, name, entry["options"])
    return found


def _check_model(model: nn.Module, plain: dict[str, Tensor], saved: str, folder: Path) -> None:
    """Raise InputError unless the plain model has exactly these tensors, in these shapes and types."""
    own = model.state_dict()
    what = f"{folder} holds a quantized {saved}, which does not fit this {type(model).__name__}"
    different = sorted(own.keys() ^ plain.keys())
    if different:
        side = "the file lacks" if different[0] in own else "the model lacks"
        raise InputError(
            f"{what}: {side} {different[0]} ({len(different)} tensors differ); build it as it was built then"
        )
    for key, value in own.items():
        if value.shape != plain[key].shape:
            raise InputError(
                f"{what}: {key} is {list(plain[key].shape)} there and {list(value.shape)} in the model; "
                "give the model it was made from"
            )
        if value.dtype != plain[key].dtype:
            dtype = _dtype_name(plain[key])
            raise InputError(f"{what}: {key} is {dtype} in the file; call model.to(torch.{dtype}) first")


def _site(entry: dict[str, Any]) -> Site:
    format = get_format(entry["format"]) if entry["format"] else None
    return Site(**{**entry, "format": format, "shape": tuple(entry["shape"])})


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _config(folder: Path) -> dict[str, Any]:
    """The configuration of a saved model, of a version that is read."""
    if not (folder / CONFIG).is_file():
        raise InputError(f"{folder} is not a saved quantized model: it has no {CONFIG}; save one there first")
    try:
        config = json.loads((folder / CONFIG).read_text())
        kind, version, _ = config["format"], config["version"], config["tensors"]
    except (ValueError, KeyError, TypeError):
        raise InputError(f"{folder / CONFIG} is damaged or was not written by s2d; save the model again") from None
    if kind != "s2d.quantized" or version != VERSION:
        raise InputError(f"{folder / CONFIG} is {kind} version {version}, but this s2d reads version {VERSION} only")
    return config


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The configuration and the tensors of a saved model, checked to belong together."""
    config = _config(folder)
    name = config["tensors"]
    path = folder / Path(name).name
    try:
        if _file_name(path) != name:
            raise InputError(f"{path} is damaged: its content does not match {CONFIG}; save the model again")
        return config, load_file(path)
    except (OSError, SafetensorError) as error:
        raise InputError(f"cannot read {path}: {error}") from None


def _file_name(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return f"weights-{digest.hexdigest()[:16]}.safetensors"
