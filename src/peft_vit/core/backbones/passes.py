"""Forward passes that are watched, or computed otherwise for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

from peft_vit.core.backbones.head_blocks import VitOnLastBlocks


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put a model into evaluation mode for a while."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@contextmanager
def capturing_inputs(modules: Mapping[str, nn.Module], record: Callable[[str, Tensor], object]) -> Iterator[None]:
    """Call `record(name, first input)` at each call of some modules, for a while."""
    with ExitStack() as stack:
        for name, module in modules.items():

            def hook(_: nn.Module, inputs: tuple[Any, ...], name: str = name) -> None:
                record(name, inputs[0])

            stack.callback(module.register_forward_pre_hook(hook).remove)
        yield


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Replace the `forward` of modules for a while; the modules, their names and their hooks stay."""
    others = {module: vars(module).get("forward") for module in forwards}  # of another library
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, other in others.items():
            if other is None:
                del vars(module)["forward"]
            else:
                vars(module)["forward"] = other


@contextmanager
def class_token_alone(model: nn.Module) -> Iterator[None]:
    """For a while, let the last block compute the class token alone, where that is all that the head reads.

    Its other tokens are read by their keys and values only. So the output of attention, the MLP and the norm after it
    are computed for one token, forward and backward. It is for timm's VisionTransformer with plain blocks; what others
    compute stays.
    """
    vit: Any = next((part for part in model.modules() if type(part) in (VisionTransformer, VitOnLastBlocks)), None)
    last = None if vit is None else vit.blocks[-1]
    reads_it_alone = vit is not None and vit.global_pool == "token" and vit.attn_pool is None
    # A forward that another library has put there is not known to do what timm's does.
    if reads_it_alone and type(last) is Block and "forward" not in vars(last):
        with replaced_forwards({last: partial(_class_token, last)}):
            yield
    else:
        yield


def _class_token(block: Any, x: Tensor) -> Tensor:
    """Return what timm's `Block` does, of the first token alone: (B, N, D) -> (B, 1, D)."""
    handle = block.attn.proj.register_forward_pre_hook(lambda _, inputs: (inputs[0][:, :1],))  # (B, N, D) -> (B, 1, D)
    try:
        attended = block.attn(block.norm1(x))
    finally:
        handle.remove()
    x = x[:, :1] + block.drop_path1(block.ls1(attended))
    result: Tensor = x + block.drop_path2(block.ls2(block.mlp(block.norm2(x))))
    return result
