"""What stands before a linear layer and can be computed again for next to nothing: a norm, an activation function.

A layer needs its inputs x for the gradients of its update, and a norm or an activation needs its own inputs, too. Where
x = f(s) with such an f, a layer keeps s alone, which f keeps anyway, and computes x again: of the 16 values for each
token and width that a block of a Vision Transformer keeps, 10 are left.
"""

from __future__ import annotations

from typing import NamedTuple, cast

import torch
from timm.layers import GELU, GELUTanh, LayerNorm, LayerNormFp32, QuickGELU, RmsNorm
from torch import Tensor, nn
from torch.func import functional_call

from peft_vit.backbones import Backbone

# By exact type: LayerNorm2d is a LayerNorm and acts on another dimension.
_NORMS = {nn.LayerNorm, nn.RMSNorm, LayerNorm, LayerNormFp32, RmsNorm}
_ACTIVATIONS = {nn.GELU, nn.SiLU, GELU, GELUTanh, QuickGELU}
_OF_TRANSFORMERS = {"GELUActivation", "QuickGELUActivation", "GELUTanh", "SiLUActivation"}  # of its `activations`
_MADE_BY = "_peft_vit_made_by"


class RowFunction(NamedTuple):
    """A norm or an activation function, which acts row by row over the last dimension.

    Attributes:
        module: whose outputs no hook of others has seen.
        parameters: the module's, by name, as they were then: `functional_call` changes them for a while.
    """

    module: nn.Module
    parameters: dict[str, Tensor]

    @property
    def is_norm(self) -> bool:
        """Whether the module is a norm, whose inputs are the residual stream's."""
        return type(self.module) in _NORMS

    def __call__(self, values: Tensor) -> Tensor:
        """Return what the module makes of values, (..., width); an activation function also of some columns."""
        made: Tensor
        if any(self.module.get_parameter(name) is not one for name, one in self.parameters.items()):
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
            if _acts_on_rows(module) and _remember not in module._forward_hooks.values():
                module.register_forward_hook(_remember)


def source_of(x: Tensor) -> Source | None:
    """Return what a tensor was made from, where it is known and unchanged, and no parameter there is trained."""
    source: Source | None = getattr(x, _MADE_BY, None)
    if source is None or any(parameter.requires_grad for parameter in source.function.parameters.values()):
        return None
    return source if source.versions == (x._version, source.values._version) else None


def _acts_on_rows(module: nn.Module) -> bool:
    if type(module) in _NORMS:
        return len(cast(nn.LayerNorm, module).normalized_shape) == 1
    return type(module) in _ACTIVATIONS or type(module).__name__ in _OF_TRANSFORMERS


def _remember(module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
    if torch.compiler.is_compiling():  # the compiler chooses what is kept
        return
    if not (torch.is_grad_enabled() and output.requires_grad and _is_all_that_makes(module)):
        return
    if len(inputs) == 1 and output is not inputs[0]:  # one in place has overwritten its inputs
        versions = (output._version, inputs[0]._version)
        setattr(output, _MADE_BY, Source(RowFunction(module, dict(module.named_parameters())), inputs[0], versions))


def _is_all_that_makes(module: nn.Module) -> bool:
    """Whether no hook of others changes the outputs or looks at their gradient, and all parameters are known."""
    return len(module._forward_hooks) == 1 and not getattr(module, "_is_replica", False)  # one of DataParallel's
