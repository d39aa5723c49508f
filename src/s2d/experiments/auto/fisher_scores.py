"""Scores: how much the rounding of each tensor changes what the model says, from one backward pass.

For a layer with the output y, and its output y' with one tensor rounded, the change of the log-likelihood of a label is
<g, y' - y> to first order, with g its gradient at y. Over labels that are drawn from the model's own output the mean
square of this change is the Fisher-weighted error of the layer (Amari 1998), and half of it the divergence from the
full-precision model, in nats. So no label of the data is read, and one backward pass serves every width, range and
site: each only needs its layer's output once more. Changes of several sites add up, example by example:

    divergence of a candidate  =  1/2 mean_n (sum_sites change_n)^2

Outputs that are no scores of classes or tokens (embeddings) get a random projection in place of a label: then the mean
square is the squared error of the output. Deviation: one label for each example, instead of an exact expectation.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.experiments.auto.candidates import tables_of
from s2d.export.copies import shared_copy
from s2d.export.lowering import round_embeddings
from s2d.io.files import write_atomic
from s2d.models.graph import Graph
from s2d.models.running import evaluating, main_output
from s2d.quant import QuantSpec, Site, planned
from s2d.quant.calibration.observe import Batches, Job
from s2d.quant.modules.sites import insert
from s2d.quant.numerics.quantizer import Quantizer, switched_on
from s2d.quant.ptq.rtn import rtn

Changes = dict[str, Tensor]
Kind = Literal["classes", "tokens", "values"]


def option_of(site: Site) -> str:
    """The name of a way to round a tensor: equal for sites with equal codes."""
    assert site.format is not None
    static = site.what != "weight" and site.granularity not in ("token", "span")
    size = f"-{site.group}" if site.group else ""
    return f"{site.name} {site.format.name} {site.granularity}{size}{f' {site.observer}' if static else ''}"


def option_of_table(name: str, bits: int) -> str:
    """The name of a way to round an embedding table."""
    return f"{name} {bits} bits"


def table_options(model: nn.Module, bits: int) -> list[str]:
    """The options of a model's embedding tables at a width."""
    tables = {id(table) for table in tables_of(model)}
    return [option_of_table(name, bits) for name, module in model.named_modules() if id(module) in tables]


@dataclass
class Scores:
    """The changes of every option, and where they are kept.

    Attributes:
        file: Read at the first use, written by `add`.
        changes: For each option the change of the log-likelihood of every example, ``[examples]``.
    """

    file: Path
    changes: Changes = field(default_factory=dict)

    @staticmethod
    def open(file: Path) -> Scores:
        """What an earlier call kept; empty without it."""
        return Scores(file, load_file(file) if file.is_file() else {})

    def add(self, found: Changes) -> None:
        """Take in and keep the changes of further options."""
        self.changes |= found
        content = save(self.changes)
        write_atomic(self.file, lambda file: file.write(content))

    def knows(self, options: Sequence[str]) -> bool:
        """Whether all of these were scored."""
        return all(option in self.changes for option in options)

    def divergence(self, options: Sequence[str]) -> float:
        """The predicted divergence from full precision when these options are taken together, in nats of an example.

        Raises:
            KeyError: One was not scored.
        """
        if not options:
            return 0.0
        return 0.5 * float(torch.stack([self.changes[option].double() for option in options]).sum(0).square().mean())

    def alone(self, option: str) -> float:
        """The divergence that one option makes alone."""
        return self.divergence([option])


class Scorer:
    """Scores options of one model on some batches."""

    def __init__(
        self, model: nn.Module, graph: Graph, calibration: Sequence[Any], batches: Sequence[Any], kind: Kind, seed: int
    ) -> None:
        """For a plain model.

        Args:
            model: Left as it is.
            graph: Its graph.
            calibration: Batches for static ranges.
            batches: Keyword inputs; the examples that are scored.
            kind: Of the output: ``classes`` (scores of an example), ``tokens`` (scores of every next token), or
                ``values``.
            seed: For the labels.
        """
        self.model, self.graph, self.batches, self.kind, self.seed = model, graph, batches, kind, seed
        self.calibration = Batches(calibration)
        self.options: dict[str, dict[str, tuple[nn.Module, list[Quantizer]]]] = {}  # module, option: its other self
        self._whole: nn.Module | None = None

    def want_sites(self, spec: QuantSpec, known: Changes) -> None:
        """Score every site of a spec that is not known yet."""
        done = {*known, *(option for each in self.options.values() for option in each)}
        found = planned(self.model, spec, self.calibration, self.graph)
        sites = [
            replace(each, format=None, granularity="", observer="") if each.format and option_of(each) in done else each
            for each in found
        ]
        if not any(site.format for site in sites):
            return
        trial = shared_copy(self.model)
        quantizers = insert(trial, sites)
        rtn(Job(trial, spec, sites, quantizers, self.calibration, self.seed, False, traced=self.graph))
        for site, quantizer in quantizers.items():
            other = trial.get_submodule(site.module)
            self.options.setdefault(site.module, {})[option_of(site)] = (other, [quantizer])
        self._whole = self._whole or trial  # with its quantizers off it is the plain model, without fused paths

    def want_tables(self, bits: int, known: Changes) -> None:
        """Score the embedding tables at a width."""
        trial = shared_copy(self.model)
        for name in round_embeddings(trial, bits):
            option = option_of_table(name, bits)
            if option not in known:
                self.options.setdefault(name, {})[option] = (trial.get_submodule(name), [])

    def run(self) -> Changes:
        """One forward and one backward pass of every batch.

        Returns:
            The changes of all wanted options; zero for a layer that no example reached.

        Raises:
            InputError: A gradient is not finite.
        """
        if not self.options:
            return {}
        whole = self._whole or shared_copy(self.model)
        whole.requires_grad_(True)  # so that every output has a gradient; none of a weight is computed
        generator = torch.Generator().manual_seed(self.seed)
        parts: list[Changes] = []
        with evaluating(whole), torch.enable_grad():
            for batch in self.batches:
                examples = len(next(iter(batch.values())))
                with _recorded(whole, list(self.options)) as calls:
                    output = main_output(whole(**batch))
                    loss = self._loss(output, batch, generator)
                gradients = torch.autograd.grad(loss, [call.output for call in calls], allow_unused=True)
                parts.append(self._changes(calls, gradients, examples))
        whole.requires_grad_(False)
        names = [option for each in self.options.values() for option in each]
        found = {name: torch.cat([part[name] for part in parts]) for name in names}
        wrong = next((name for name, change in found.items() if not bool(change.isfinite().all())), None)
        if wrong is not None:
            raise InputError(f"{wrong}: the gradient is not finite; check the model and the training data")
        return found

    def _loss(self, output: Tensor, batch: Mapping[str, Tensor], generator: torch.Generator) -> Tensor:
        """The log-likelihood of labels drawn from the output, summed; of other outputs a random projection."""
        if self.kind == "values":
            return (output.float() * torch.randn(output.shape, generator=generator)).sum()
        scores = output.float().flatten(0, -2)
        likelihoods = scores.log_softmax(-1)
        labels = torch.multinomial(likelihoods.detach().exp(), 1, generator=generator)
        chosen = likelihoods.gather(1, labels)[:, 0]
        mask = batch.get("attention_mask")
        if self.kind == "tokens":
            real = torch.ones_like(chosen) if mask is None else mask.flatten().to(chosen)
            return (chosen * real).sum() / max(float(real.sum()) / len(output), 1.0) ** 0.5  # nats of a token
        return chosen.sum()

    @torch.no_grad()
    def _changes(self, calls: Sequence[_Call], gradients: Sequence[Tensor | None], examples: int) -> Changes:
        found = {option: torch.zeros(examples) for each in self.options.values() for option in each}
        for call, gradient in zip(calls, gradients, strict=True):
            if gradient is None:
                continue
            for option, (module, quantizers) in self.options[call.module].items():
                with switched_on(quantizers):
                    other = main_output(module.forward(*call.args, **call.kwargs))
                found[option] += _by_example((other - call.output) * gradient, examples)
        return found


@dataclass
class _Call:
    """One call of a layer."""

    module: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    output: Tensor


@contextmanager
def _recorded(model: nn.Module, names: Sequence[str]) -> Iterator[list[_Call]]:
    """The calls of some layers, in order."""
    calls: list[_Call] = []

    def hook(name: str) -> Any:
        def after(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
            calls.append(_Call(name, args, kwargs, main_output(output)))

        return after

    hooks = [model.get_submodule(name).register_forward_hook(hook(name), with_kwargs=True) for name in names]
    try:
        yield calls
    finally:
        for each in hooks:
            each.remove()


def _by_example(change: Tensor, examples: int) -> Tensor:
    """The sum of a tensor over all but its examples, ``[examples]``.

    Where the examples cannot be told apart (tokens that are sorted by experts) the first gets all of it: gradients of
    different examples are independent with mean zero, so the mean square stays the same in expectation.
    """
    if change.ndim > 2 and change.shape[0] != examples and change.shape[1] == examples:
        change = change.transpose(0, 1)
    if change.shape[0] % examples == 0:
        return change.reshape(examples, -1).sum(1).float()
    found = torch.zeros(examples)
    found[0] = change.sum()
    return found
