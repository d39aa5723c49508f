"""PTQ4ViT: twin uniform ranges behind softmax and GELU, and scales searched by their effect on the loss.

Yuan et al., "PTQ4ViT: Post-Training Quantization for Vision Transformers with Twin Uniform Quantization", ECCV 2022,
arXiv 2111.12293. Twin ranges (section 3.2) are in `s2d.quant.numerics.log_and_twin`, here in their piecewise form.

Scales (section 3.3). For a layer with output O, and O^ when weight and input are rounded, the range minimises

    sum (g * (O - O^))^2,    g = d loss / d O                                                              (eq. 11)

out of 100 multiples 0.01 .. 1.19 of the observed one: three rounds of first the weight's, then the input's.

The gradient. The paper's loss compares the quantized model with the full-precision one; in its code both are the
full-precision one when gradients are taken, so the loss is at its minimum, the exact gradient is 0, what is left is
floating-point noise. Here g is the gradient of a Fisher probe. It is not 0 at the optimum, and its squares are the
diagonal of the curvature:

    models with class logits    loss = -log p(y), y drawn from the model's own prediction ("categorical")
    other outputs f             loss = <f / rms(f), e>, e standard normal ("gaussian")

Where this differs from the release besides that:

- Rows of a weight that have scales of their own get each the best multiple; granularity and format are the spec's. The
  paper's are one symmetric range a tensor.
- Output errors are taken over 256 tokens drawn from all, not over all.
- q, k, v and the probabilities are searched by their own rounding error, every value weighted by its squared gradient,
  in one round; the paper takes the error of the product they enter.
- Inputs behind a GELU are recognised by their minimum, -0.3 or above, and a maximum three times as large in magnitude.
  The negative range ends at that minimum, so QuickGELU and SiLU are right too; gated products have no floor and stay
  as they are.

Both protocols begin with the ranges of the spec's observers (the paper's are min-max). Cost: one backward pass, and 600
products of 256 tokens with every weight. When not to use it: at 4 bits and below, methods that change weights win.

Shapes: n sampled tokens, o outputs, d inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn

from s2d.models.masks import Padding, token_mask
from s2d.models.running import evaluating, real_tokens
from s2d.quant.calibration.observe import Job, observe, set_weight_range
from s2d.quant.calibration.readings import Layer, layers_of
from s2d.quant.modules.linear import QuantizedLinear
from s2d.quant.modules.sites import OPERANDS, Site
from s2d.quant.numerics.formats import IntFormat
from s2d.quant.numerics.log_and_twin import TwinQuantizer
from s2d.quant.numerics.observers import Rounding, affine_rounding, coded_distribution, value_codes, weight_range
from s2d.quant.numerics.quantizer import Quantizer
from s2d.quant.ptq import register
from s2d.quant.ptq.repq import plain_integer

MULTIPLES = tuple(0.01 + index * (1.2 - 0.01) / 100 for index in range(100))
ROUNDS = 3
SPLITS = 20
TOKENS = 256
# Images (or texts) a backward pass; the paper's.
PIECE = 4
# The floor of SiLU is -0.28, those of the GELUs -0.16 to -0.17.
GELU_FLOOR = -0.3

Probe = Literal["categorical", "gaussian"]


def weighted_error(output: Tensor, target: Tensor, gradient: Tensor | None) -> Tensor:
    """``sum over tokens of (g * (O - O^))^2`` for every output, ``[o]``; g is 1 where there is none."""
    error = output - target
    return (error if gradient is None else error * gradient).square_().sum(0)


def probe_loss(
    model: nn.Module, output: Any, mask_of: Callable[[Tensor], Tensor | None] | None, generator: torch.Generator
) -> tuple[Tensor, Probe]:
    """The loss whose gradient weights the errors, and which one it is.

    Args:
        model: Whose output it is; a positive ``num_classes`` says that a plain tensor holds logits.
        output: What the model returned.
        mask_of: Gives the padding mask ``[B, T]`` of a part of the output; None where nothing is padded.
        generator: Draws labels or noise (on CPU).
    """
    logits = getattr(output, "logits", None)
    if isinstance(output, Tensor) and (getattr(model, "num_classes", 0) or 0) > 1:
        logits = output
    if isinstance(logits, Tensor):
        flat = real_tokens(logits, mask_of and mask_of(logits), "input").flatten(0, -2).float()
        labels = torch.multinomial(flat.detach().softmax(-1).cpu(), 1, generator=generator).to(flat.device)
        return -flat.log_softmax(-1).gather(1, labels).sum(), "categorical"
    parts = []
    for value in _tensors(output):
        flat = real_tokens(value, mask_of and mask_of(value), "input").float()
        noise = torch.randn(flat.shape, generator=generator).to(flat.device)
        scale = flat.detach().square().mean().sqrt().clamp(min=torch.finfo(torch.float32).tiny)
        parts.append((flat * noise).sum() / scale)
    return torch.stack(parts).sum(), "gaussian"


def _tensors(output: Any) -> list[Tensor]:
    """The floating-point tensors in an output that a gradient can start from."""
    if isinstance(output, Tensor):
        return [output] if output.is_floating_point() and output.requires_grad else []
    if isinstance(output, Mapping):
        return [
            t for key, value in output.items() if key not in ("hidden_states", "attentions") for t in _tensors(value)
        ]
    return [t for value in output for t in _tensors(value)] if isinstance(output, (tuple, list)) else []


@dataclass
class Sample:
    """Some tokens of one layer.

    Attributes:
        x: Inputs before rounding, ``[n, d]`` in parts.
        g: Gradients at the outputs of each part, ``[n, o]``; missing where they cannot be seen.
        lo: The smallest input of all tokens.
        hi: The largest.
    """

    x: list[Tensor] = field(default_factory=list)
    g: dict[int, Tensor] = field(default_factory=dict)
    lo: float = 0.0
    hi: float = 0.0

    @property
    def gradient(self) -> Tensor | None:
        """``[n, o]``, or None: then all outputs count alike."""
        if not self.x or len(self.g) < len(self.x):
            return None
        together = torch.cat([self.g[part] for part in range(len(self.x))])
        return together if bool(together.any()) else None


@register("ptq4vit", "PTQ4ViT: twin ranges behind softmax and GELU, scales searched by a Fisher-weighted output error")
def ptq4vit(job: Job) -> None:
    """PTQ4ViT; weights stay as they are and are rounded to nearest in the ranges that were found.

    Grouped convolutions, which are no matrix product, keep the ranges of the spec's observers.
    """
    observe(job)
    layers = layers_of(job, job.quantizers)
    samples = {layer: Sample() for layer in layers if layer.unfolds}
    operands = {
        site: torch.zeros(2**16, dtype=torch.float64)
        for site, quantizer in job.quantizers.items()
        if site.what in OPERANDS and plain_integer(quantizer)
    }
    _look(job, samples, operands)
    for site, counts in operands.items():
        if bool(counts.any()):
            _search_operand(job, site, *coded_distribution(counts))
    for layer in layers:
        set_weight_range(layer.site, layer.quantizer, layer.weight.detach())
        sample = samples.get(layer)
        if sample is not None and sample.x:
            _search_layer(layer, _with_twin(job, layer, sample), sample)


def _with_twin(job: Job, layer: Layer, sample: Sample) -> Quantizer | None:
    """The quantizer of the layer's input, a twin in its place behind a GELU."""
    quantizer = layer.input_quantizer
    if quantizer is None or not plain_integer(quantizer):
        return quantizer
    if not (GELU_FLOOR <= sample.lo < 0.0 and sample.hi > -3.0 * sample.lo):
        return quantizer
    site = next(site for site, member in job.quantizers.items() if member is quantizer)
    hi = quantizer.scale * (quantizer.format.qmax - quantizer.zero_point)
    twin = TwinQuantizer(quantizer.format, name=site.name, split="sign")
    twin.set_range(hi.new_tensor(sample.lo), hi)
    job.replace_quantizer(site, twin)
    return twin


@torch.no_grad()
def _search_layer(layer: Layer, input_quantizer: Quantizer | None, sample: Sample) -> None:
    x, gradient = torch.cat(sample.x).float(), sample.gradient
    weight = layer.weight.detach().flatten(1).float()
    target = x @ weight.T
    free_input = input_quantizer is not None and not input_quantizer.dynamic
    for _ in range(ROUNDS):
        rounded = x if input_quantizer is None else input_quantizer.fake_quantize(x)
        if not layer.quantizer.dynamic:
            search_weight(layer.quantizer, weight, rounded, target, gradient)
        if free_input:
            assert input_quantizer is not None
            held = layer.quantizer.fake_quantize(layer.weight.detach()).flatten(1).float()
            search_input(input_quantizer, x, held, target, gradient)


def search_weight(
    quantizer: Quantizer, weight: Tensor, rounded: Tensor, target: Tensor, gradient: Tensor | None
) -> None:
    """Give a weight's quantizer the best multiple of its min-max range, for each row where rows have their own.

    Args:
        quantizer: One range a tensor, a channel or a group.
        weight: ``[o, d]``.
        rounded: Inputs as their quantizer holds them, ``[n, d]``.
        target: The layer's outputs at full precision, without the bias, ``[n, o]``.
        gradient: ``[n, o]``, or None.
    """
    shape = quantizer.scale.shape
    rows = weight.reshape(max(1, quantizer.scale.numel()), -1)
    lo, hi = (end.reshape(shape) for end in weight_range(rows, "minmax", quantizer.format, name=quantizer.name))
    losses = []
    for multiple in MULTIPLES:
        quantizer.set_range(multiple * lo, multiple * hi)
        losses.append(weighted_error(rounded @ quantizer.fake_quantize(weight).T, target, gradient))
    table = torch.stack(losses)  # [multiples, o]
    multiples = torch.tensor(MULTIPLES, device=weight.device)
    if not shape:
        best = multiples[table.sum(1).argmin()]
    else:
        best = multiples[table.argmin(0)].view((-1,) + (1,) * (len(shape) - 1))
    quantizer.set_range(best * lo, best * hi)


def search_input(quantizer: Quantizer, x: Tensor, weight: Tensor, target: Tensor, gradient: Tensor | None) -> None:
    """Give an input's quantizer the best multiple of its range; a twin keeps its negative side.

    Args:
        quantizer: One range a tensor, which it has already.
        x: ``[n, d]``, before rounding.
        weight: As its quantizer holds it, ``[o, d]``.
        target: The layer's outputs at full precision, without the bias, ``[n, o]``.
        gradient: ``[n, o]``, or None.
    """
    before = quantizer.scale.clone()
    twin = isinstance(quantizer, TwinQuantizer)
    losses = []

    def stretch(multiple: float) -> None:
        # The zero point stays: a multiple of the range is a multiple of the scale.
        quantizer.scale.copy_(torch.stack([before[0], multiple * before[1]]) if twin else multiple * before)

    for multiple in MULTIPLES:
        stretch(multiple)
        losses.append(weighted_error(quantizer.fake_quantize(x) @ weight.T, target, gradient).sum())
    stretch(MULTIPLES[int(torch.stack(losses).argmin())])


def _search_operand(job: Job, site: Site, values: Tensor, weights: Tensor) -> None:
    """The range of q, k, v or the probabilities, from the distribution of their values, weighted."""
    quantizer = job.quantizers[site]
    if site.what == "probs":
        twin = TwinQuantizer(quantizer.format, name=site.name, split="magnitude")
        ends = torch.tensor([2.0**-power for power in range(SPLITS)])
        twin.set_range(*best_range(values, weights, ends, torch.ones(SPLITS), twin.rounding))
        job.replace_quantizer(site, twin)
        return
    assert isinstance(quantizer.format, IntFormat)
    lo = quantizer.scale * (quantizer.format.qmin - quantizer.zero_point)
    hi = quantizer.scale * (quantizer.format.qmax - quantizer.zero_point)
    multiples = torch.tensor(MULTIPLES, device=lo.device)
    quantizer.set_range(*best_range(values, weights, multiples * lo, multiples * hi, affine_rounding(quantizer.format)))


def best_range(values: Tensor, weights: Tensor, lo: Tensor, hi: Tensor, rounding: Rounding) -> tuple[Tensor, Tensor]:
    """The candidate range (``[candidates]`` each) of least weighted squared error.

    Args:
        values: ``[values]``.
        weights: What each counts.
        lo: Lower ends.
        hi: Upper ends.
        rounding: How a range rounds.
    """
    errors = (rounding(values.expand(len(lo), -1), lo[:, None], hi[:, None]) - values).double().square() @ weights
    best = errors.argmin()
    return lo[best], hi[best]


def _look(job: Job, samples: Mapping[Layer, Sample], operands: Mapping[Site, Tensor]) -> None:
    """One forward and one backward pass over the data: fills the samples, and sums squared gradients by value."""
    generator = job.generator("ptq4vit")
    model = job.model
    wanted = [parameter for parameter in model.parameters() if parameter.requires_grad]
    handles: list[Any] = []
    with token_mask(model, job.graph) as masks, evaluating(model):
        try:
            for parameter in wanted:
                parameter.requires_grad_(False)
            begin = [layer.module for layer in samples] + [model.get_submodule(site.module) for site in operands]
            handles += [
                module.register_forward_pre_hook(_begin_graph, with_kwargs=True) for module in dict.fromkeys(begin)
            ]
            handles += [
                layer.module.register_forward_hook(_sampler(layer, sample, masks, generator), with_kwargs=True)
                for layer, sample in samples.items()
            ]
            for site, counts in operands.items():
                job.quantizers[site].watch = _weigher(site, counts, masks)
            for batch in job.batches:
                for args, kwargs in _pieces(batch, next(model.parameters()).device):
                    with torch.enable_grad():
                        output = model(*args, **kwargs)
                        if not _tensors(output):  # without blocks no gradient begins: all outputs count alike
                            continue
                        loss, _ = probe_loss(model, output, masks.of_output, generator)
                    if loss.requires_grad:
                        loss.backward()
        finally:
            for handle in handles:
                handle.remove()
            for site in operands:
                job.quantizers[site].watch = None
            for parameter in wanted:
                parameter.requires_grad_(True)


def _begin_graph(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Let gradients be known from the first layer on, without any for the parameters."""
    begun: dict[int, Tensor] = {}  # attention asks whether query, key and value are the same object

    def start(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.requires_grad:
            return value
        return begun.setdefault(id(value), value.detach().requires_grad_(True))

    return tuple(start(value) for value in args), {key: start(value) for key, value in kwargs.items()}


def _sampler(layer: Layer, sample: Sample, masks: Padding, generator: torch.Generator) -> Any:
    def after(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        inputs = layer.inputs(args, kwargs)
        if len(inputs) != 1:
            return
        rows, padding = layer.rows(inputs[0].detach(), masks), masks(layer.site.module)
        if not len(rows):
            return
        lo, hi = torch.aminmax(rows)
        sample.lo, sample.hi = min(sample.lo, float(lo)), max(sample.hi, float(hi))
        room = min(TOKENS // 8, TOKENS - sum(len(part) for part in sample.x))
        if room <= 0:
            return
        chosen = torch.randperm(len(rows), generator=generator)[:room].to(rows.device)
        part = len(sample.x)
        sample.x.append(rows[chosen])

        def keep(g: Tensor) -> None:
            sample.g[part] = real_tokens(g, padding, "input").flatten(0, -2)[chosen].float()

        if isinstance(module, QuantizedLinear) and output.requires_grad:
            output.register_hook(keep)

    return after


def _weigher(site: Site, counts: Tensor, masks: Padding) -> Any:
    def see(x: Tensor) -> None:
        if not x.requires_grad:
            return
        padding = masks(site.module, site.what)
        codes = value_codes(real_tokens(x.detach(), padding, site.what)).cpu()

        def weigh(g: Tensor) -> None:
            weights = real_tokens(g, padding, site.what).double().square().flatten().cpu()
            counts.add_(torch.bincount(codes, weights=weights, minlength=2**16))

        x.register_hook(weigh)

    return see


def _pieces(batch: Any, device: torch.device) -> Iterator[tuple[tuple[Any, ...], dict[str, Any]]]:
    """A batch as calls of a few samples each; as one call where its tensors do not share their first dimension."""
    keys = list(batch) if isinstance(batch, Mapping) else None
    values = (
        list(batch.values()) if isinstance(batch, Mapping) else [batch] if isinstance(batch, Tensor) else list(batch)
    )
    sizes = {value.shape[0] if value.ndim else 0 for value in values if isinstance(value, Tensor)}
    size = sizes.pop() if len(sizes) == 1 else 0
    for start in range(0, size or 1, PIECE):
        part = [
            (value[start : start + PIECE] if size else value).to(device) if isinstance(value, Tensor) else value
            for value in values
        ]
        yield ((), dict(zip(map(str, keys), part, strict=True))) if keys is not None else (tuple(part), {})
