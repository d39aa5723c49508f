"""Differences of a model from what its library builds by its name: other heads, pooling, activations, ties, buffers.

Models do not store their constructor's arguments. So a model is compared with the one that its description builds,
module by module: class, plain attributes, shapes, children. The differences are stored as plain data and restored on
loading. They contain no code: classes are modules of torch.nn, timm and open_clip, which are filled, not constructed.
"""

from __future__ import annotations

import copy
import functools
import importlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError

JSON = dict[str, Any]
_LIBRARIES = ("torch.nn.", "timm.", "open_clip.")
_FUNCTIONS = ("torch.nn.functional", "torch._C._nn", "timm.layers.")
_INTERNAL = frozenset({*nn.Module().__dict__, "forward"})
# A library's notes on the origin of weights; no computation uses them.
_NOTES = frozenset({"pretrained_cfg", "default_cfg", "config", "generation_config", "feature_info"})


class _OpaqueError(Exception):
    """A value that is no plain data."""


def changes(model: nn.Module, built: nn.Module) -> JSON:
    """The modules of ``model`` that differ from ``built``, with the differences.

    Args:
        model: Plain or quantized; quantizers and modules added by methods are ignored.
        built: A model built from the same description; may be on the meta device.

    Raises:
        InputError: A difference that cannot be stored; the module and the attribute are named.
    """
    theirs = dict(built.named_modules())
    found: dict[str, JSON] = {}
    for name, module in model.named_modules():
        if _is_ours(module):
            continue
        if "class" in found.get(name.rpartition(".")[0], {}):
            theirs.pop(name, None)  # what was below went with the module that is replaced
        if change := _change(name, module, theirs.get(name)):
            found[name] = change
    return found


def apply(model: nn.Module, written: Mapping[str, JSON]) -> nn.Module:
    """Apply the result of `changes` to the model that the description builds, in place; new tensors are empty.

    Raises:
        InputError: A module or value that `changes` never writes.
    """
    for name in sorted(written, key=lambda name: (name.count(".") if name else -1, name)):
        entry = written[name]
        parent, _, last = name.rpartition(".")
        own = model.get_submodule(name) if _has(model, name) else None
        if "class" in entry:
            own = _blank(entry["class"])
            if not name:
                raise InputError("the description replaces the whole model; save it again")
            model.get_submodule(parent)._modules[last] = own
        assert own is not None
        for key in entry.get("removed", ()):
            own.__dict__.pop(key, None)
        own.__dict__.update({k: _decode(v) for k, v in entry.get("attributes", {}).items() if k not in _INTERNAL})
        if "parameters" in entry:
            own._parameters.clear()
            for key, shape in entry["parameters"].items():
                own.register_parameter(key, None if shape is None else nn.Parameter(torch.empty(shape)))
        if "buffers" in entry:
            own._buffers.clear()
            own._non_persistent_buffers_set.clear()
            for key, (shape, dtype, kept) in entry["buffers"].items():
                value = None if shape is None else torch.zeros(shape, dtype=getattr(torch, dtype))
                own.register_buffer(key, value, persistent=kept)
        if "children" in entry:
            before = dict(own._modules)
            own._modules.clear()
            own._modules.update({key: before.get(key) if kept else None for key, kept in entry["children"]})
    return model


def ties(model: nn.Module) -> list[list[str]]:
    """The names of parameters that are one tensor, in groups of two and more."""
    groups: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        groups.setdefault(id(parameter), []).append(name)
    return sorted(group for group in groups.values() if len(group) > 1)


def tie(model: nn.Module, wanted: list[list[str]]) -> None:
    """Tie exactly these groups of parameters, in place; all others are untied."""
    shared = {name: group[0] for group in wanted for name in group}
    seen: dict[int, str] = {}
    for name, parameter in list(model.named_parameters(remove_duplicate=False)):
        head = shared.get(name, name)
        if head != name:
            _put(model, name, model.get_parameter(head))
        elif seen.setdefault(id(parameter), name) != name:
            _put(model, name, nn.Parameter(parameter.detach().clone(), parameter.requires_grad))


def unsaved_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict leaves out (positions, tables of sines), by name."""
    kept = model.state_dict().keys()
    found = {name: buffer for name, buffer in model.named_buffers() if name not in kept and not buffer.is_meta}
    ours = tuple(f"{name}." for name, module in model.named_modules() if name and _is_ours(module))
    return {name: b.detach().clone().contiguous() for name, b in found.items() if not name.startswith(ours or ("\0",))}


def put_buffers(model: nn.Module, buffers: Mapping[str, Tensor]) -> None:
    """Restore the buffers of `unsaved_buffers`; those that the model does not have are skipped."""
    for name, value in buffers.items():
        parent, _, last = name.rpartition(".")
        if _has(model, parent) and last in (module := model.get_submodule(parent))._buffers:
            module._buffers[last] = value


def match_types(model: nn.Module, types: Mapping[str, torch.dtype]) -> None:
    """Make parameters and buffers those types, in place; names that are not there are passed over."""
    for name, tensor in model.named_parameters(remove_duplicate=False):  # of tied ones, a file may name any
        if (wanted := types.get(name, tensor.dtype)) != tensor.dtype:
            tensor.data = tensor.data.to(wanted)
    for name, tensor in list(model.named_buffers()):
        if (wanted := types.get(name, tensor.dtype)) != tensor.dtype:
            parent, _, last = name.rpartition(".")
            model.get_submodule(parent)._buffers[last] = tensor.to(wanted)


def _put(model: nn.Module, name: str, parameter: nn.Parameter) -> None:
    parent, _, last = name.rpartition(".")
    model.get_submodule(parent)._parameters[last] = parameter


def _has(model: nn.Module, name: str) -> bool:
    try:
        model.get_submodule(name)
    except AttributeError:
        return False
    return True


def _is_ours(module: nn.Module) -> bool:
    return type(module).__module__.startswith("s2d.quant")


def _change(name: str, module: nn.Module, built: nn.Module | None) -> JSON:
    """The entry of one module; empty where it is as built."""
    plain: type[nn.Module] = getattr(type(module), "plain_class", type(module))
    same = built is not None and plain is type(built)
    found: JSON = {}
    if not same:
        if not plain.__module__.startswith(_LIBRARIES) or "<" in plain.__qualname__ or not name:
            raise InputError(
                f"{name or 'the model'} is a {plain.__name__}, which its library does not put there and s2d cannot "
                "write down; register the model with s2d.models.register_architecture"
            )
        found["class"] = f"{plain.__module__}:{plain.__qualname__}"
    mine, theirs = _attributes(module), _attributes(built) if same and built is not None else {}
    changed = {key: value for key, value in mine.items() if key not in theirs or not _equal(value, theirs[key])}
    attributes: JSON = {}
    for key, value in changed.items():
        try:
            attributes[key] = _encode(value if _is_plain(value) else _without_caches(module).get(key))
        except _OpaqueError:
            raise InputError(
                f"{name or 'the model'}.{key} is a {type(value).__name__} that its library does not put there and s2d "
                "cannot write down; save the model's state_dict yourself"
            ) from None
    removed = sorted(theirs.keys() - mine.keys())
    found |= {"attributes": attributes} if attributes else {}
    found |= {"removed": removed} if removed else {}
    for part, read in (("parameters", _parameters), ("buffers", _buffers), ("children", _children)):
        value = read(module)
        if not same or built is None or value != read(built):
            found[part] = value
    return found


def _attributes(module: nn.Module) -> JSON:
    return {
        k: v
        for k, v in module.__dict__.items()
        if k not in _INTERNAL | _NOTES and not k.startswith(("_s2d", "_plain_"))
    }


def _is_plain(value: Any) -> bool:
    try:
        _encode(value)
    except _OpaqueError:
        return False
    return True


def _without_caches(module: nn.Module) -> JSON:
    """A module's attributes after its own `_apply`, as ``.to`` calls it: what a forward keeps for later is dropped."""
    bare = copy.copy(module)
    own = {part: dict(getattr(module, part)) for part in ("_parameters", "_buffers")}
    bare.__dict__ = {**module.__dict__, **own, "_modules": {}}
    return bare._apply(lambda tensor: tensor).__dict__


def _parameters(module: nn.Module) -> JSON:
    return {key: None if value is None else list(value.shape) for key, value in module._parameters.items()}


def _buffers(module: nn.Module) -> JSON:
    def entry(key: str, value: Tensor | None) -> list[Any]:
        kept = key not in module._non_persistent_buffers_set
        # Floating-point types are those of the weights, and matched when the tensors are read.
        kind = "float32" if value is None or value.is_floating_point() else str(value.dtype).removeprefix("torch.")
        return [None if value is None else list(value.shape), kind, kept]

    added = getattr(type(module), "added_buffers", ())  # of methods; stored with the quantizers
    return {key: entry(key, value) for key, value in module._buffers.items() if key not in added}


def _children(module: nn.Module) -> list[list[Any]]:
    return [[key, child is not None] for key, child in module._modules.items() if child is None or not _is_ours(child)]


def _equal(a: Any, b: Any) -> bool:
    try:
        return _encode(a) == _encode(b)
    except _OpaqueError:  # objects of the library's own, compared by what they are
        return type(a) is type(b) and getattr(a, "__qualname__", "") == getattr(b, "__qualname__", "")


def _encode(value: Any) -> Any:
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if type(value) is float:
        return value if math.isfinite(value) else {"float": str(value)}
    if isinstance(value, (tuple, list)):
        return {"list" if isinstance(value, list) else "tuple": [_encode(each) for each in value]}
    if type(value) is dict and all(isinstance(key, str) for key in value):
        return {"dict": {key: _encode(each) for key, each in value.items()}}
    if isinstance(value, torch.dtype):
        return {"dtype": str(value).removeprefix("torch.")}
    if isinstance(value, functools.partial):
        return {"partial": [_encode(value.func), _encode(list(value.args)), _encode(dict(value.keywords))]}
    name = f"{getattr(value, '__module__', None)}:{getattr(value, '__qualname__', None)}"
    try:
        if _named(name) is value:
            return {"name": name}
    except InputError:
        pass
    raise _OpaqueError


def _decode(value: Any) -> Any:
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "float":
        return float(content)
    if kind in ("list", "tuple"):
        return (list if kind == "list" else tuple)(_decode(each) for each in content)
    if kind == "dict":
        return {key: _decode(each) for key, each in content.items()}
    if kind == "dtype":
        return getattr(torch, content)
    if kind == "partial":
        return functools.partial(_decode(content[0]), *_decode(content[1]), **_decode(content[2]))
    return _named(content)


def _named(name: str) -> Any:
    """A module class of the libraries, or a function of their layers, by ``module:name``."""
    place, _, last = name.partition(":")
    if f"{place}.".startswith((*_LIBRARIES, *_FUNCTIONS)) and "." not in last and not last.startswith("_"):
        try:
            found = getattr(importlib.import_module(place), last, None)
        except ImportError:
            found = None
        if isinstance(found, type) and issubclass(found, nn.Module):
            return found
        if callable(found) and not isinstance(found, type) and f"{place}.".startswith(_FUNCTIONS):
            return found
    raise InputError(f"the description names {name!r}, which is no layer of torch, timm or open_clip; save it again")


def _blank(name: str) -> nn.Module:
    """A module of a class without its constructor's work."""
    kind = _named(name)
    if not isinstance(kind, type):
        raise InputError(f"the description names {name!r}, which is no layer; save it again")
    module = kind.__new__(kind)  # pyright: ignore[reportCallIssue]
    nn.Module.__init__(module)
    return module
