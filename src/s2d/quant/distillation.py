"""Distillation: the distance of a quantized model from the full-precision one, as a loss.

Sources: GPLQ (arXiv 2506.11784), feature mimicking: the student's features follow the teacher's in the directions in
which the teacher's vary most. The outputs are compared by squared error; for class scores it is at least as good as the
divergence of the probabilities (arXiv 2105.08919).

    loss = |(h_s - h_t) P|^2 / |(h_t - mean) P|^2  +  |y_s - y_t|^2 / |y_t - mean|^2

with h the tokens behind the last block ``[N, D]`` (of each tower), P ``[D, k]`` the teacher's leading principal
directions and y the model's output; both terms are shares, so that one weight fits all models.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.models.blocks import outermost
from s2d.models.graph import Graph
from s2d.models.masks import Padding, token_mask
from s2d.models.running import evaluating, main_output, real_tokens, run
from s2d.quant.calibration.observe import Batches, traced
from s2d.quant.modules.sites import is_quantized

VARIANCE = 0.6
_MULTIPLE = 32
_ROWS = 256  # rows of outputs in float64 at once; a language model's output is as wide as its vocabulary


def principal_directions(second_moment: Tensor, mean: Tensor, variance: float = VARIANCE) -> Tensor:
    """The leading directions that hold a share of the variance, their number rounded up to a multiple of 32.

    Args:
        second_moment: ``E[h h^T]``, ``[D, D]`` float64.
        mean: ``E[h]``, ``[D]``.
        variance: The share, in (0, 1].

    Returns:
        ``[D, k]``, orthonormal columns.
    """
    values, vectors = torch.linalg.eigh(second_moment - torch.outer(mean, mean))
    values = values.flip(0).clamp(min=0.0)
    reached = int((values.cumsum(0) < variance * values.sum()).sum()) + 1
    return vectors.flip(1)[:, : min(-(-reached // _MULTIPLE) * _MULTIPLE, len(mean))]


class Distiller:
    """Compares a student's forward passes with the teacher's on the same inputs.

    Hooks record the student's forward passes (in training mode, with gradients); `loss` runs the teacher on the same
    inputs.
    """

    def __init__(
        self,
        student: nn.Module,
        teacher: nn.Module,
        calibration: Iterable[Any],
        *,
        variance: float = VARIANCE,
        outputs: bool = True,
    ) -> None:
        """Measure the teacher's features on calibration data, and put hooks on the student.

        Args:
            student: From `prepare_qat`.
            teacher: The same model at full precision; it is put into evaluation mode and stays as it is.
            calibration: Batches, as for `prepare_qat`.
            variance: See `principal_directions`.
            outputs: Compare the models' outputs too, not only their features.

        Raises:
            InputError: The teacher is quantized, is the student, or has other blocks; an impossible share.
        """
        if student is teacher or is_quantized(teacher):
            raise InputError("the teacher is the plain model at full precision; keep a copy of it for that")
        if not 0.0 < variance <= 1.0:
            raise InputError(f"variance={variance!r} is a share, above 0 and at most 1")
        self._teacher = teacher.eval()
        self._outputs = outputs
        known = {name for name, _ in student.named_parameters()}
        strange = [name for name, _ in teacher.named_parameters() if name not in known]
        if strange:
            raise InputError(
                f"the student has no {strange[0]}; the teacher must be the student's model at full precision"
            )
        batches = Batches(calibration)
        self._graph = traced(self._teacher, batches)
        names = _last_of_each_tower(self._graph)
        self._calls: list[tuple[tuple[Any, ...], dict[str, Any], Any, dict[str, Tensor]]] = []
        self._seen: dict[str, Tensor] = {}
        self._own = {name: teacher.get_submodule(name) for name in names}
        self._directions: dict[str, Tensor] = {}
        self._spread: dict[str, float] = {}
        self._measure(batches, variance)
        self._hooks = [student.get_submodule(name).register_forward_hook(self._note(name)) for name in names]
        self._hooks.append(student.register_forward_hook(self._note_call, with_kwargs=True))

    @torch.no_grad()
    def _measure(self, batches: Batches, variance: float) -> None:
        moments: dict[str, list[Tensor]] = {}
        spans: list[tuple[Tensor, float]] = []  # of each output: the mean [D], and the mean squared length

        def feature(name: str) -> Callable[..., None]:
            def hook(module: nn.Module, args: Any, output: Any) -> None:
                tokens = real_tokens(main_output(output), mask(name, "output"), "input").flatten(0, -2).double()
                found = [torch.tensor(float(len(tokens))), tokens.sum(0), tokens.mT @ tokens]
                known = moments.get(name)
                moments[name] = found if known is None else [a.to(b) + b for a, b in zip(known, found, strict=True)]

            return hook

        def span(module: nn.Module, args: Any, output: Any) -> None:
            y = main_output(output).detach()
            rows = real_tokens(y, mask.of_output(y), "input").flatten(0, -2)
            length = sum(float(part.double().square().sum()) for part in rows.split(_ROWS))
            spans.append((rows.mean(0, dtype=torch.float64), length / len(rows)))

        hooks = [module.register_forward_hook(feature(name)) for name, module in self._own.items()]
        hooks.append(self._teacher.register_forward_hook(span))
        try:
            with token_mask(self._teacher, self._graph) as mask, evaluating(self._teacher):
                for index, batch in enumerate(batches):
                    run(self._teacher, batch, index)
        finally:
            for hook in hooks:
                hook.remove()
        for name, (count, total, square) in moments.items():
            mean, moment = total / count, square / count
            P = principal_directions(moment, mean, variance)
            self._directions[name] = P.float()
            self._spread[name] = float(((P.mT @ moment) * P.mT).sum() - (P.mT @ mean).square().sum())
        center = torch.stack([mean for mean, _ in spans]).mean(0)
        self._spread[""] = sum(length for _, length in spans) / len(spans) - float(center.square().sum())

    def _note(self, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, output: Any) -> None:
            if torch.is_grad_enabled() and module.training:
                self._seen[name] = main_output(output)

        return hook

    def _note_call(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        if torch.is_grad_enabled() and module.training:
            self._calls.append((args, kwargs, output, self._seen))
        self._seen = {}

    def loss(self) -> Tensor:
        """The distance of the student's forward passes since the last call from the teacher's, a scalar.

        Raises:
            InputError: There were none in training mode.
        """
        if not self._calls:
            raise InputError("the student has not run in training mode since the last loss(); call it after the model")
        calls, self._calls = self._calls, []
        total = torch.zeros((), device=main_output(calls[0][2]).device)
        for args, kwargs, output, features in calls:
            expected, wanted, masks = self._ask(args, kwargs)
            mask = masks.of_output(expected)
            y_s, y_t = (real_tokens(y, mask, "input") for y in (main_output(output), expected))
            if self._outputs:
                total = total + _share(y_s, y_t, self._spread[""])
            for name, feature in features.items():
                mask = masks(name, "output")
                h_s, h_t = (real_tokens(h, mask, "input").flatten(0, -2).float() for h in (feature, wanted[name]))
                P = self._directions[name].to(h_s.device)
                total = total + _share(h_s @ P, h_t @ P, self._spread[name]) / len(features)
        return total / len(calls)

    @torch.no_grad()
    def _ask(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor], Padding]:
        """The teacher's output and features for a call, and the call's padding masks."""
        wanted: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[..., None]:
            return lambda module, args, output: wanted.__setitem__(name, main_output(output))

        hooks = [module.register_forward_hook(keep(name)) for name, module in self._own.items()]
        try:
            with token_mask(self._teacher, self._graph) as mask:
                output = self._teacher(*args, **kwargs)
                return main_output(output), wanted, mask
        finally:
            for hook in hooks:
                hook.remove()

    def remove(self) -> None:
        """Take the hooks out."""
        for hook in self._hooks:
            hook.remove()
        self._hooks, self._calls = [], []


def _share(found: Tensor, expected: Tensor, spread: float) -> Tensor:
    """Mean squared distance of vectors, in units of the spread."""
    return (found.float() - expected.float()).square().sum(-1).mean() / max(spread, 1e-12)


def _last_of_each_tower(graph: Graph) -> list[str]:
    """The block that runs last of each sequence."""
    return [blocks.members[-1][0] for blocks in outermost(graph)]
