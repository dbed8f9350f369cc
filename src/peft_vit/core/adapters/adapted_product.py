"""Inputs times an adapted weight, y = x (W + dW)^T + bias, with W frozen; and the gradients.

There are two ways to add an update, and the shapes choose. With many rows of x, W + dW is formed for the
forward pass and again for the backward pass, so that the large products stay one each, and nothing of W's size is kept
in between. With few rows, as with one image, forming it would take as long as the product itself; then a training step
does two skinny products beside W's, while predictions form the sum all the same. A packed W is unpacked in any case,
and the update joins it there.

Of the inputs, what the gradient of the update needs is kept: x, or what x was made from, or the inputs summed over
groups. A norm or an activation function keeps its own inputs s, too: where x = f(s) with such an f, a layer keeps s
alone, and computes x again for next to nothing. Of the 16 values for each token and width that a block of a Vision
Transformer keeps, 10 are left.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from timm.layers import GELU, GELUTanh, LayerNorm, LayerNormFp32, QuickGELU, RmsNorm
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call
from torch.nn import functional as F

from peft_vit.base.errors import UserError
from peft_vit.core.adapters.low_rank import RowUpdate
from peft_vit.core.backbones import Backbone
from peft_vit.core.quantization import QuantizedTensor

LEAST_VALUES = 1 << 17  # of an input: below, keeping it costs less than what computing it again takes to call
_VALUES_AT_ONCE = 3 << 18  # about as many of an input are computed again together: 3 MB in float32
_WEIGHTS_AT_ONCE = 3 << 16  # of a packed weight become floats together, see `product_by_pieces`: 0.8 MB
_ROWS_AT_ONCE = 288  # of inputs are multiplied with these: what a product packs of them stays in the cache, and small
_COLUMNS = 64  # of which multiples are taken together
_SAVES_FIRST: ContextVar[bool] = ContextVar("saves_first", default=False)  # see `saving_first`
# By exact type: LayerNorm2d is a LayerNorm and acts on another dimension.
_NORMS = {nn.LayerNorm, nn.RMSNorm, LayerNorm, LayerNormFp32, RmsNorm}
_ACTIVATIONS = {nn.GELU, nn.SiLU, GELU, GELUTanh, QuickGELU}
_OF_TRANSFORMERS = {"GELUActivation", "QuickGELUActivation", "GELUTanh", "SiLUActivation"}  # of its `activations`
_MADE_BY = "_peft_vit_made_by"


@dataclass(frozen=True, eq=False)
class FrozenWeight:
    """The weight under adapters, (1 - share) * float + share * quantized, of shape (out, in).

    Attributes:
        floating: the float weight; None once it has been freed, and then the share counts as 1.
        quantized: the packed weight; None if there is none, and then the share counts as 0.
        share: 0 to 1.
    """

    floating: Tensor | None
    quantized: QuantizedTensor | None = None
    share: float = 0.0

    @property
    def shape(self) -> tuple[int, int]:
        """Return the numbers of outputs and inputs."""
        weight = self.quantized if self.floating is None else self.floating
        assert weight is not None
        rows, columns = weight.shape
        return rows, columns

    @property
    def is_float(self) -> bool:
        """Whether the float weight alone is in use."""
        return self.quantized is None or (self.floating is not None and self.share == 0)

    def columns(self, columns: slice) -> FrozenWeight:
        """Return the weight of some inputs, whole groups and whole bytes of a packed one."""
        if columns == slice(0, self.shape[1]):
            return self
        floating = None if self.floating is None else self.floating[:, columns]
        quantized = None if self.quantized is None else self.quantized.columns(columns)
        return FrozenWeight(floating, quantized, self.share)

    def unpack(self, added: Tensor | None = None) -> Tensor:
        """Return the weight in float, (out, in), without a gradient and in memory of its own.

        Args:
            added: (out, groups), added to every weight of the group of inputs.
        """
        if self.floating is None or (self.quantized is not None and self.share == 1):
            assert self.quantized is not None
            return self.quantized.dequantize(added=added)
        weight = self.floating.detach()
        if self.is_float:
            weight = weight.clone()
        else:
            assert self.quantized is not None
            weight = self.quantized.dequantize(weight.dtype).lerp_(weight, 1 - self.share)
        if added is not None:
            grouped = weight.unflatten(1, (added.shape[1], -1))  # (out, groups, group size), a view
            grouped.add_(added.detach().unsqueeze(-1))  # (out, groups, 1)
        return weight


def adapted_linear(
    x: Tensor, frozen: FrozenWeight, bias: Tensor | None, updates: Sequence[RowUpdate], *, pool: int = 1
) -> Tensor:
    """Apply a frozen linear layer with low-rank updates on slices of its rows.

    Under autocast the product runs in autocast's type; W and the updates are summed in float32 before.

    Args:
        x: inputs (..., in).
        frozen: the weight (out, in).
        bias: (out,) or None.
        updates: the rows of each site that has a rank above 0, and its adapter; likewise of its probe.
        pool: inputs per group on which the updates are constant, the same for all of them.

    Returns:
        Outputs (..., out).
    """
    if not updates and frozen.is_float:
        assert frozen.floating is not None
        return F.linear(x, frozen.floating, bias)
    if frozen.floating is not None and frozen.floating.requires_grad and torch.is_grad_enabled():
        raise UserError("a weight under an adapter is frozen; it can't be trained as well", field="weight")
    device = x.device.type
    autocast = torch.is_autocast_enabled(device)
    dtype = torch.get_autocast_dtype(device) if autocast else x.dtype
    source = source_of_input(x) if updates and x.numel() >= LEAST_VALUES else None
    with torch.autocast(device, enabled=False):
        spans = tuple(span for span, _ in updates)
        factors = [adapter.factors() for _, adapter in updates]
        parameters = [part for pair in factors for part in pair]
        if pool > 1 and updates:
            added = factors[0][0].new_zeros(frozen.shape[0], x.shape[-1] // pool)  # (out, groups)
            for span, (left, right) in zip(spans, factors, strict=True):
                added[span] += left @ right  # (out_s, groups)
            parameters = [added]
        saved = x if source is None else source.values  # (..., in)
        function = None if source is None else source.function
        # Forming W + dW touches 2 in out values, two skinny products rows (in + out). Without a backward pass it is
        # formed in any case, so that predictions do not depend on how images are put in batches.
        rows, (outputs, inputs) = x.numel() // x.shape[-1], frozen.shape
        many_rows = rows * (inputs + outputs) > 2 * inputs * outputs
        forms_sum = not torch.is_grad_enabled() or pool > 1 or not frozen.is_float or many_rows
        layer = _Layer(spans, pool, dtype, autocast, forms_sum, function)
        x = x.detach()
        node = None
        first = not torch.compiler.is_compiling() and _SAVES_FIRST.get()  # compilers can't read context variables
        if first and saved.requires_grad and torch.is_grad_enabled():
            saved = _Saved.apply(saved, x, frozen, layer, parameters)
            node = saved.grad_fn
        result: Tensor = _AdaptedProduct.apply(saved, x, frozen, layer, node, bias, *parameters)
    return result


def product_by_pieces(x: Tensor, weight: QuantizedTensor, bias: Tensor | None) -> Tensor:
    """Return x (..., in) times packed weights, (..., out), of which some rows at a time become floats; no gradient.

    It takes a tenth longer than the product with all of them at once, and megabytes less.
    """
    (outputs, inputs), rows = weight.shape, x.reshape(-1, x.shape[-1])  # (N, in)
    y = x.new_empty(len(rows), outputs)  # (N, out)
    parts = max(1, -(-len(rows) // _ROWS_AT_ONCE))
    step = max(1, _WEIGHTS_AT_ONCE // (_COLUMNS * inputs)) * _COLUMNS
    for start in range(0, outputs, step):
        part = slice(start, start + step)
        floats = weight.rows(part).dequantize(x.dtype).T  # (in, some of out)
        for some, out in zip(rows.chunk(parts), y[:, part].chunk(parts), strict=True):
            if bias is None:
                torch.mm(some, floats, out=out)
            else:
                torch.addmm(bias[part], some, floats, out=out)
    return y.view(*x.shape[:-1], outputs)


def saving_first(forward: Callable[..., Any], *inputs: Any, **named: Any) -> Any:
    """Call a block whose layers save what their backward passes need before they compute.

    Activation checkpointing ends a second forward pass with the last tensor that was saved in the first one. So it
    leaves out the last large product of a block.
    """
    token = _SAVES_FIRST.set(True)
    try:
        return forward(*inputs, **named)
    finally:
        _SAVES_FIRST.reset(token)


@dataclass(frozen=True, eq=False)
class _Layer:
    """A layer during one pass.

    Attributes:
        spans: the rows of each update.
        pool: inputs per group on which the updates are constant.
        dtype: of the products.
        autocast: whether the module runs under autocast to that type.
        summed: whether W + dW is formed.
        function: makes its inputs x of what is saved; None if x itself is.
    """

    spans: tuple[slice, ...]
    pool: int
    dtype: torch.dtype
    autocast: bool
    forms_sum: bool
    function: RowFunction | None

    def weight(self, frozen: FrozenWeight, parameters: Sequence[Tensor]) -> Tensor:
        """Return W + dW, or W, (out, in) in the type of the products; of some columns, where both are of those."""
        if self.pool > 1:
            return frozen.unpack(parameters[0] if parameters else None).to(self.dtype)
        if not self.forms_sum:
            assert frozen.floating is not None
            return frozen.floating.detach().to(self.dtype)
        total = frozen.unpack()
        for span, left, right in zip(self.spans, parameters[::2], parameters[1::2], strict=True):
            total[span].addmm_(left.to(total.dtype), right.to(total.dtype))  # (out_s, in)
        return total.to(self.dtype)

    def of_columns(self, parameters: Sequence[Tensor], columns: slice) -> list[Tensor]:
        """Return the parameters of some columns of the weight, whole groups of them."""
        if self.pool > 1:
            return [added[:, columns.start // self.pool : columns.stop // self.pool] for added in parameters]
        return [factor if place % 2 == 0 else factor[:, columns] for place, factor in enumerate(parameters)]

    def inputs(self, saved: Tensor) -> Tensor:
        """Return x in the type of the products, as the forward pass had it."""
        assert self.function is not None
        with torch.autocast(saved.device.type, self.dtype, enabled=self.autocast):
            return self.function(saved).to(self.dtype)

    def needed(self, x: Tensor) -> Tensor:
        """Return what the gradients of the updates need of inputs (N, in): all, or sums over groups (N, groups)."""
        return x if self.pool == 1 else x.unflatten(-1, (-1, self.pool)).sum(-1)  # (N, groups, pool) -> (N, groups)

    def pieces(self, frozen: FrozenWeight, rows: int) -> list[slice]:
        """Return the columns of x, (rows, in), that the backward pass takes at a time.

        All, or parts of whole groups and whole bytes of a packed weight. A norm needs all of a row at once.
        """
        width, count = frozen.shape[1], 1
        groups = 1 if frozen.quantized is None else frozen.quantized.groups
        least = math.lcm(_COLUMNS, self.pool, 1 if groups == 1 else width // groups)
        whole_rows = self.function is not None and type(self.function.module) in _NORMS
        while not whole_rows and rows * width // count > _VALUES_AT_ONCE and width % (2 * count * least) == 0:
            count *= 2
        step = width // count
        return [slice(start, start + step) for start in range(0, width, step)]


class _AdaptedProduct(torch.autograd.Function):
    """y = x (W + dW)^T + bias.

    With g = dL/dy (N, out), x (N, in), left (out, r), right (r, in):

        dL/dx = g (W + dW), dL/dleft = g^T (x right^T), dL/dright = (g left)^T x,

    and where the update is constant on groups of inputs, dW[o, i] = added[o, group of i], dL/dadded = g^T p with
    p (N, groups) the inputs summed over their groups.

    Where x = f(saved), what is returned for `saved` is dL/dsaved: f's own backward pass is part of this one, some
    columns at a time, so that neither x nor dL/dx nor W + dW is there whole.
    """

    @staticmethod
    def forward(
        ctx: Any,
        saved: Tensor,
        x: Tensor,
        frozen: FrozenWeight,
        layer: _Layer,
        node: Any,
        bias: Tensor | None,
        *parameters: Tensor,
    ) -> Tensor:
        x = x.to(layer.dtype)
        rows = x.reshape(-1, x.shape[-1])  # (N, in)
        weight = layer.weight(frozen, parameters)  # (out, in)
        y = F.linear(x, weight, None if bias is None else bias.to(x.dtype))  # (..., in) -> (..., out)
        if not layer.forms_sum:
            inner = _stack(parameters[1::2]).to(x.dtype) @ rows.T  # (sum of ranks, N)
            flat = y.view(len(rows), y.shape[-1])  # (N, out)
            for span, left, part in zip(layer.spans, parameters[::2], _by_update(inner, parameters), strict=True):
                flat[:, span].addmm_(part.T, left.T.to(x.dtype))  # (N, out_s)
        if node is None:
            _save(ctx, saved, x, frozen, layer, parameters)
        ctx.node = node
        ctx.quantized, ctx.share = frozen.quantized, frozen.share
        ctx.layer, ctx.shape, ctx.dtype = layer, x.shape, saved.dtype
        return y

    @staticmethod
    @once_differentiable  # what is kept has no graph of its own
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        # (N, in) or (N, groups) | None, (out, in) | None, and left (out_s, r), right (r, in) in turn or (out, groups)
        saved, floating, *parameters = (ctx if ctx.node is None else ctx.node).saved_tensors
        layer: _Layer = ctx.layer
        gradient = gradients[0].reshape(-1, gradients[0].shape[-1]).to(layer.dtype)  # (N, out)
        frozen = FrozenWeight(floating, ctx.quantized, ctx.share)
        factors = _FactorGradients(layer, gradient, parameters) if parameters and layer.pool == 1 else None
        of_groups: list[Tensor] = []  # (out, c / pool) each
        pieces = layer.pieces(frozen, len(gradient))
        grad_saved = None
        if ctx.needs_input_grad[0] and len(pieces) > 1:
            grad_saved = gradient.new_empty((len(gradient), ctx.shape[-1]), dtype=ctx.dtype)  # (N, in)
        for columns in pieces:
            made, leaf, needed = None, None, None
            if layer.function is not None:
                with torch.enable_grad():
                    leaf = saved[:, columns].detach().requires_grad_(ctx.needs_input_grad[0])  # (N, c)
                    made = layer.inputs(leaf)  # (N, c)
                needed = layer.needed(made.detach())  # (N, c / pool)
            elif parameters:
                needed = saved[:, columns.start // layer.pool : columns.stop // layer.pool]  # (N, c / pool)
            if factors is not None and needed is not None:
                factors.add(columns, needed)
            elif needed is not None:
                of_groups.append((needed.T @ gradient).T)  # (out, c / pool)
            if not ctx.needs_input_grad[0]:
                continue
            weight = layer.weight(frozen.columns(columns), layer.of_columns(parameters, columns))  # (out, c)
            grad_x = gradient @ weight  # (N, out) @ (out, c) -> (N, c)
            if factors is not None and not layer.forms_sum:
                grad_x.addmm_(factors.outer.T, factors.rights[:, columns])
            if made is not None and leaf is not None:
                (grad_x,) = torch.autograd.grad(made, leaf, grad_x)  # by what x was made from, (N, c)
            if grad_saved is None:
                grad_saved = grad_x
            else:
                grad_saved[:, columns] = grad_x
        grad_bias = gradient.sum(0) if ctx.needs_input_grad[5] else None  # (N, out) -> (out,)
        grad_saved = None if grad_saved is None else grad_saved.view(ctx.shape)  # (N, in) -> (..., in)
        of_parameters = [torch.cat(of_groups, 1)] if of_groups else []  # (out, groups)
        if factors is not None:
            of_parameters = factors.result()
        return grad_saved, None, None, None, None, grad_bias, *of_parameters


class _FactorGradients:
    """The gradients of the factors, from that of y, (N, out), and some columns of x at a time.

    Every skinny product is written with the r rows on the left, (r, N) or (r, out): BLAS then streams the large
    factor once in its own order. With r columns on the right the same product takes three to five times as long.
    """

    def __init__(self, layer: _Layer, gradient: Tensor, factors: Sequence[Tensor]) -> None:
        self._spans, self._gradient, self._factors = layer.spans, gradient, factors
        self.rights = _stack(factors[1::2]).to(layer.dtype)  # (sum of ranks, in)
        pairs = zip(layer.spans, factors[::2], strict=True)
        self.outer = _stack([left.T.to(layer.dtype) @ gradient[:, span].T for span, left in pairs])  # (ranks, N)
        self._inner = torch.zeros_like(self.outer)  # right x^T, (ranks, N)
        self._to_rights = torch.empty_like(self.rights)  # (ranks, in)

    def add(self, columns: slice, x: Tensor) -> None:
        """Take columns of x, (N, c)."""
        self._inner.addmm_(self.rights[:, columns], x.T)  # (ranks, c) @ (c, N) -> (ranks, N)
        self._to_rights[:, columns] = self.outer @ x  # (ranks, N) @ (N, c) -> (ranks, c)

    def result(self) -> list[Tensor]:
        """Return the gradients, left (out_s, r) and right (r, in) in turn."""
        inner, rights = (_by_update(stacked, self._factors) for stacked in (self._inner, self._to_rights))
        lefts = [  # (r, N) @ (N, out_s) -> (out_s, r)
            (part @ self._gradient[:, span]).T for span, part in zip(self._spans, inner, strict=True)
        ]
        return [gradient for pair in zip(lefts, rights, strict=True) for gradient in pair]


class _Saved(torch.autograd.Function):
    """Saves what the product after it needs in its backward pass, and hands on `saved` and its gradient."""

    @staticmethod
    def forward(
        ctx: Any, saved: Tensor, x: Tensor, frozen: FrozenWeight, layer: _Layer, parameters: Sequence[Tensor]
    ) -> Tensor:
        _save(ctx, saved, x.to(layer.dtype), frozen, layer, parameters)
        return saved.view_as(saved)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        return *gradients, None, None, None, None


def _save(
    ctx: Any, saved: Tensor, x: Tensor, frozen: FrozenWeight, layer: _Layer, parameters: Sequence[Tensor]
) -> None:
    needed = None
    if layer.function is not None:
        needed = saved.reshape(-1, saved.shape[-1])  # (N, in), from which x is made again
    elif parameters:
        needed = layer.needed(x.reshape(-1, x.shape[-1]))  # (N, in), or summed over groups, (N, groups)
    # The float weight is saved, not held, so that the backward pass lets go of it.
    ctx.save_for_backward(needed, frozen.floating, *parameters)


def _by_update(stacked: Tensor, factors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Split (sum of ranks, ...) at each update."""
    return stacked.split([right.shape[0] for right in factors[1::2]])  # (r, ...) each


def _stack(parts: Sequence[Tensor]) -> Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(list(parts))


class InPlace(nn.Module):
    """An activation function that writes over its inputs, an image at a time."""

    def __init__(self, function: nn.Module) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        """Return x (B, ...), changed."""
        for part in x.split(1):
            part.copy_(self.function(part))
        return x


# --- what inputs were made from ---------------------------------------------------------------------------------------


class RowFunction(NamedTuple):
    """A norm or an activation function, which acts row by row over the last dimension.

    Attributes:
        module: whose outputs no hook of others has seen.
        parameters: the module's, by name, as they were then: `functional_call` changes them for a while.
    """

    module: nn.Module
    parameters: dict[str, Tensor]

    def __call__(self, values: Tensor) -> Tensor:
        """Return what the module makes of values, (..., width); an activation function also of some columns."""
        made: Tensor
        if any(self.module.get_parameter(name) is not before for name, before in self.parameters.items()):
            made = functional_call(self.module, self.parameters, (values,))
        else:
            made = self.module.forward(values)
        return made


class Source(NamedTuple):
    """What a tensor x = function(values) was made from.

    Attributes:
        function: of the values.
        values: of x's shape.
        versions: of x and of the values, which operations in place count up.
    """

    function: RowFunction
    values: Tensor
    versions: tuple[int, int]


def remember_sources(model: nn.Module) -> None:
    """Let the outputs of the norms and activation functions in a model's blocks say what they were made from."""
    backbone = Backbone.within(model)
    for name in backbone.blocks:
        for module in backbone.model.get_submodule(name).modules():
            if type(module) in _NORMS:
                by_rows = len(cast(nn.LayerNorm, module).normalized_shape) == 1
            else:
                by_rows = is_activation(module)
            if by_rows and _remember not in module._forward_hooks.values():
                module.register_forward_hook(_remember)


def is_activation(module: nn.Module) -> bool:
    """Return whether a module acts on each value alone."""
    return type(module) in _ACTIVATIONS or type(module).__name__ in _OF_TRANSFORMERS


def source_of_input(x: Tensor) -> Source | None:
    """Return what a tensor was made from, where it is known and unchanged, and no parameter there is trained."""
    source: Source | None = getattr(x, _MADE_BY, None)
    if source is None or any(parameter.requires_grad for parameter in source.function.parameters.values()):
        return None
    return source if source.versions == (x._version, source.values._version) else None


def _remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if torch.compiler.is_compiling():  # the compiler chooses what is kept
        return
    if not (torch.is_grad_enabled() and output.requires_grad):
        return
    # Another's hook may change the outputs or look at their gradient; a replica of DataParallel hides its parameters.
    if len(module._forward_hooks) > 1 or getattr(module, "_is_replica", False):
        return
    if len(inputs) == 1 and output is not inputs[0]:  # one in place has overwritten its inputs
        versions = (output._version, inputs[0]._version)
        setattr(output, _MADE_BY, Source(RowFunction(module, dict(module.named_parameters())), inputs[0], versions))
