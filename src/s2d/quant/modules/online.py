"""Online operations: transforms in a model's forward that cannot be folded into a weight.

    OnlineLinear    y = Q(W) Q(t(x)) + U D t(x) + b,    t(x) = (x H) / s

H is a Hadamard rotation done by two small products (QuaRot's R4), s a scale for every input channel, U and D a low-rank
branch at 16 bits beside the rounded weight (SVDQuant). Each is optional. Without rounding, y is what the plain Linear
gave, whose weight was ``(W + U D) diag(1/s) H^T``.

    OnlineBlock     y = block(x Q) Q^T + C x + c

Q rotates at the entrance of a residual stream's first block, Q^T back at the exit of its last; C and c make up for what
rounding does to a block (QwT). Each is optional.

Both are swapped in like quantizers and hold only buffers. `detach` swaps them out and gives the weights their plain
form back; C and c, which belong to the rounding, are dropped. Storage rebuilds them with `describe` and `attach`.

Shapes: I inputs, O outputs, r rank, D width of the stream.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from s2d.errors import InputError
from s2d.quant.modules.folding import change_basis, merge_norm, streams
from s2d.quant.modules.linear import Quantized, QuantizedLinear, swap_in, swap_out, turn_into
from s2d.quant.numerics.hadamard import apply_factors

LINEAR_BUFFERS = ("left", "right", "smooth", "down", "up")
BLOCK_BUFFERS = ("enter", "leave", "compensation", "compensation_bias")


class OnlineLinear(QuantizedLinear):
    """A quantized Linear with a transform of its input, a low-rank branch, or both.

    Attributes:
        left: A ``[a, a]`` of H = A kron B, or None.
        right: B ``[b, b]``, ``a * b = I``.
        smooth: s ``[I]``, or None.
        down: D ``[r, I]``, or None.
        up: U ``[O, r]``.
    """

    added_buffers = LINEAR_BUFFERS  # which `s2d.models.differences` leaves to storage
    left: Tensor | None
    right: Tensor | None
    smooth: Tensor | None
    down: Tensor | None
    up: Tensor | None

    def transform_input(self, input: Tensor) -> Tensor:
        """What the quantizer of the input sees: t(x), ``[..., I]``."""
        if self.left is not None and self.right is not None:
            input = apply_factors(input, self.left, self.right)
        return input if self.smooth is None else input / self.smooth

    def forward(self, input: Tensor) -> Tensor:
        """``[..., I]`` to ``[..., O]``."""
        input = self.transform_input(input)
        output = self.quantized_product(input)
        if self.down is not None and self.up is not None:
            output = output + F.linear(F.linear(input, self.down), self.up)
        return output

    @torch.no_grad()
    def rotate_input(self, left: Tensor, right: Tensor) -> None:
        """Rotate the input by H = left kron right (orthogonal, float64) and the weight's columns likewise."""
        assert self.left is None and self.smooth is None and self.down is None
        self.weight.copy_(apply_factors(self.weight.double(), left, right))
        self.left, self.right = left.to(self.weight).contiguous(), right.to(self.weight).contiguous()

    @torch.no_grad()
    def smooth_input(self, scale: Tensor) -> None:
        """Divide the transformed input by ``scale [I]`` (> 0) and multiply the weight's columns by it."""
        assert self.down is None
        scale = scale.to(self.weight)
        self.smooth = scale if self.smooth is None else self.smooth * scale
        self.weight.copy_(self.weight.double() * scale.double())

    @torch.no_grad()
    def split_off(self, down: Tensor, up: Tensor) -> None:
        """Subtract ``up @ down`` from the weight and compute it in a separate branch."""
        assert self.down is None
        # Contiguous, as they are when loaded: the order of sums, and so the last bit, depends on it.
        self.down, self.up = down.to(self.weight).contiguous(), up.to(self.weight).contiguous()
        product = up.to(self.weight).double() @ down.to(self.weight).double()
        self.weight.copy_(self.weight.double() - product)

    @torch.no_grad()
    def plain_weight(self) -> Tensor:
        """The weight ``[O, I]`` (float64) of the plain Linear that computes the same without rounding."""
        weight = self.weight.double()
        if self.down is not None and self.up is not None:
            weight = weight + self.up.double() @ self.down.double()
        if self.smooth is not None:
            weight = weight / self.smooth.double()
        if self.left is not None and self.right is not None:
            # H is orthogonal to the accuracy of its entries' type; its inverse is its transpose.
            weight = apply_factors(weight, self.left.double().T, self.right.double().T)
        return weight


class OnlineBlock(Quantized):
    """A transformer block with a change of basis around it, a linear layer beside it, or both.

    Attributes:
        enter: Q ``[D, D]``, or None.
        leave: Q^T ``[D, D]``, or None.
        compensation: C ``[D, D]``, or None.
        compensation_bias: c ``[D]``, or None.
    """

    added_buffers = BLOCK_BUFFERS
    enter: Tensor | None
    leave: Tensor | None
    compensation: Tensor | None
    compensation_bias: Tensor | None

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The plain block's forward; the hidden states are its first argument and its (first) output."""
        hidden = hidden_states(self, args, kwargs)  # pyright: ignore[reportArgumentType]
        # Before the block runs: some add to their input in place.
        beside = None if self.compensation is None else F.linear(hidden, self.compensation, self.compensation_bias)
        if self.enter is not None:
            turned = hidden @ self.enter
            args, kwargs = ((turned, *args[1:]), kwargs) if args else (args, {**kwargs, first_name(self): turned})  # pyright: ignore[reportArgumentType]
        output = super().forward(*args, **kwargs)  # pyright: ignore[reportAttributeAccessIssue]
        main = output if isinstance(output, Tensor) else output[0]
        if self.leave is not None:
            main = main @ self.leave
        if beside is not None:
            main = main + beside
        return main if isinstance(output, Tensor) else type(output)((main, *output[1:]))


def hidden_states(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """The first argument of a block's call."""
    return args[0] if args else kwargs[first_name(block)]


def first_name(block: nn.Module) -> str:
    """The name of a block's first parameter."""
    plain = block.plain_class if isinstance(block, Quantized) else type(block)
    return next(iter(list(inspect.signature(plain.forward).parameters)[1:]))


def make_online(module: nn.Module) -> OnlineLinear:
    """Turn a `QuantizedLinear` into an `OnlineLinear` that does nothing yet, in place."""
    if not isinstance(module, OnlineLinear):
        assert isinstance(module, QuantizedLinear)
        turn_into(module, OnlineLinear)
        for name in LINEAR_BUFFERS:
            nn.Module.register_buffer(module, name, None)  # pyright: ignore[reportArgumentType]
    assert isinstance(module, OnlineLinear)
    return module


def rotate_stream(model: nn.Module, first: str, last: str, rotation: Tensor) -> None:
    """Let the stream from block ``first`` to block ``last`` enter and leave the basis Q (``[D, D]``, float64)."""
    for name in dict.fromkeys((first, last)):
        make_online_block(model.get_submodule(name), name)
    like = next(model.get_submodule(first).parameters())
    model.get_submodule(first).enter = rotation.contiguous().to(like)
    model.get_submodule(last).leave = rotation.T.contiguous().to(like)


def make_online_block(module: nn.Module, name: str) -> OnlineBlock:
    """Turn a block into an `OnlineBlock` that does nothing yet, in place."""
    if not isinstance(module, OnlineBlock):
        swap_in(module, OnlineBlock, {}, name)
        for buffer in BLOCK_BUFFERS:
            module.register_buffer(buffer, None)
    assert isinstance(module, OnlineBlock)
    return module


def describe(model: nn.Module) -> dict[str, dict[str, list[int]]]:
    """The shape of every buffer that `attach` has to make room for, by module and name."""
    found: dict[str, dict[str, list[int]]] = {}
    for name, module in model.named_modules():
        names = LINEAR_BUFFERS if isinstance(module, OnlineLinear) else BLOCK_BUFFERS
        if isinstance(module, (OnlineLinear, OnlineBlock)):
            tensors = {key: getattr(module, key) for key in names}
            found[name] = {key: list(tensor.shape) for key, tensor in tensors.items() if tensor is not None}
    return found


def attach(model: nn.Module, described: dict[str, dict[str, list[int]]]) -> None:
    """Make room for described buffers in a model with its quantizers in place; their values are still zeros.

    Raises:
        InputError: A module that is not there, or not of that kind.
    """
    for name, shapes in described.items():
        try:
            module = model.get_submodule(name)
        except AttributeError:
            raise InputError(
                f"the saved file adds work to {name}, which this model does not have; give the model it was made from"
            ) from None
        if set(shapes) <= set(LINEAR_BUFFERS) and isinstance(module, QuantizedLinear):
            make_online(module)
        elif set(shapes) <= set(BLOCK_BUFFERS):
            make_online_block(module, name)
        else:
            raise InputError(f"the saved file adds {', '.join(shapes)} to {name}, where it cannot be; save it again")
        like = next(model.get_submodule(name).parameters())
        for key, shape in shapes.items():
            setattr(module, key, torch.zeros(shape, dtype=like.dtype, device=like.device))


def detach(model: nn.Module) -> None:
    """Remove all online operations, in place; the plain modules get weights that compute the same."""
    blocks = {name: module for name, module in model.named_modules() if isinstance(module, OnlineBlock)}
    rotated = {name: leave for name, module in blocks.items() if (leave := module.leave) is not None}
    for module in model.modules():
        if isinstance(module, OnlineLinear):
            weight = module.plain_weight()
            with torch.no_grad():
                module.weight.copy_(weight)
            for name in LINEAR_BUFFERS:
                delattr(module, name)
            turn_into(module, QuantizedLinear)  # pyright: ignore[reportArgumentType]
    for stream in streams(model, "rotation") if rotated else ():
        leave = rotated.get(stream.blocks[-1])
        if leave is not None:
            # A method after the rotation may have given norms a gain, which holds in the rotated basis.
            for branch in stream.branches:
                merge_norm(model, branch)
            change_basis(model, stream, leave.double())
    for module in blocks.values():
        swap_out(module, BLOCK_BUFFERS)  # pyright: ignore[reportArgumentType]
