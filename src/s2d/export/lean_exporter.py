"""What torch's exporter to ONNX does at length and our graphs do not need: left out while a model is traced.

All of it is private to torch and onnxscript. Where a version has other names, the exporter does its usual work.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, fx

_aten: Any = torch.ops.aten
_CHECKS = ("aten._assert_scalar", "aten._assert_tensor_metadata", "aten._assert_async")  # the exporter removes them
_CASTS = ("aten.to.",)
_SAME = ("aten.detach_.", "aten.detach.", "aten.alias.")
_OTHER_NAMES = {_aten.__and__.Tensor: _aten.bitwise_and.Tensor, _aten.__or__.Tensor: _aten.bitwise_or.Tensor}


@contextlib.contextmanager
def lean_exporter() -> Iterator[None]:
    """Trace without the exporter's detours, and without its messages for developers."""
    _keep_the_operators()
    with quiet(), _without_slow_rewrites(), _without_decompositions():
        yield


@lru_cache(maxsize=1)
def _keep_the_operators() -> None:
    """Let onnxscript make its list of operators once a process, not once an export: a second each."""
    try:
        from torch.onnx._internal import _lazy_import

        functions: Any = _lazy_import.onnxscript_apis  # pyright: ignore[reportPrivateImportUsage]
        functions.get_torchlib_ops = lru_cache(maxsize=1)(functions.get_torchlib_ops)
    except (ImportError, AttributeError):
        return


@contextlib.contextmanager
def _without_slow_rewrites() -> Iterator[None]:
    """Leave out the rewrites of several outputs at once (onnxscript has one, of two Slices to a Split).

    They look through the whole graph for each of its nodes: half an hour for a language model of 30 layers.
    """
    from onnxscript import rewriter

    all_rules = getattr(rewriter, "_DEFAULT_REWRITE_RULES", None)
    if all_rules is None:
        yield
        return
    try:
        rewriter._DEFAULT_REWRITE_RULES = tuple(rule for rule in all_rules if _has_one_output(rule))
        yield
    finally:
        rewriter._DEFAULT_REWRITE_RULES = all_rules


def _has_one_output(rule: Any) -> bool:
    pattern = getattr(getattr(rule, "_matcher", None), "pattern", None)
    return getattr(pattern, "has_single_output_node", True)


@contextlib.contextmanager
def _without_decompositions() -> Iterator[None]:
    """Skip the second trace, which takes operators apart, where all of a graph's are known to ONNX as they are.

    That trace is half of an export's time.
    """
    try:
        from torch.onnx._internal.exporter import _fx_passes

        original = _fx_passes.decompose_with_registry
    except (ImportError, AttributeError):
        yield
        return

    def decompose(program: Any, registry: Any) -> Any:
        known = {each[0].fx_target for each in registry.functions.values() if each}
        return program if simplified(program.graph_module.graph, known) else original(program, registry)

    _fx_passes.decompose_with_registry = decompose
    try:
        yield
    finally:
        _fx_passes.decompose_with_registry = original


def simplified(graph: fx.Graph, known: set[Any]) -> bool:
    """Put plain operators in place of the few that a trace adds; whether all of a graph are known then.

    Args:
        graph: Of operators without parts; left as it is where one is neither known nor plain.
        known: The operators that have a translation.
    """
    changes: list[tuple[fx.Node, Any]] = []
    for node in graph.nodes:
        if node.op != "call_function":
            if node.op not in ("placeholder", "output"):
                return False
            continue
        target, name = node.target, str(node.target)
        if name.startswith(_CHECKS):
            continue
        if name.startswith((*_CASTS, *_SAME)):
            if any(user.op == "output" for user in node.users):  # the program knows its outputs by name
                return False
            changes.append((node, None if _keeps_its_type(node) else _aten._to_copy.default))
        elif target in _OTHER_NAMES:
            changes.append((node, _OTHER_NAMES[target]))
        elif target not in known or getattr(getattr(target, "_schema", None), "is_mutable", False):
            return False
    if not {operator for _, operator in changes if operator is not None} <= known:
        return False
    for node, operator in changes:
        source: Any = node.args[0]
        if operator is None:
            node.replace_all_uses_with(source)
            graph.erase_node(node)
        elif operator is _aten._to_copy.default:
            node.target, node.args, node.kwargs = operator, (source,), {"dtype": node.meta["val"].dtype}
        else:
            node.target = operator
    return True


def _keeps_its_type(node: fx.Node) -> bool:
    source = node.args[0]
    before = source.meta.get("val") if isinstance(source, fx.Node) else None
    return isinstance(before, Tensor) and before.dtype == node.meta["val"].dtype


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Suppress the exporter's messages for developers."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), open(os.devnull, "w") as nowhere, contextlib.redirect_stdout(nowhere):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
