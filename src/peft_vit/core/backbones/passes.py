"""Forward passes that are watched, caught, and taken up again at a block, whatever the class of the model.

A hook catches the arguments that reach a block, and the rest of the pass is the model's own: blocks before the caught
one hand their input on, and it gets those arguments again. So no forward pass is written a second time here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import TYPE_CHECKING, Any

from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn

if TYPE_CHECKING:
    from peft_vit.core.backbones.backbone import Backbone

Rest = Callable[[], Tensor]


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
def watching(modules: Mapping[str, nn.Module], see: Callable[[str, Tensor], None]) -> Iterator[None]:
    """For a while, tell of each call of some modules: the name, and the first input."""
    with ExitStack() as stack:
        for name, module in modules.items():
            handle = module.register_forward_pre_hook(lambda _, given, name=name: see(name, given[0]))
            stack.callback(handle.remove)
        yield


@contextmanager
def own_forwards(forwards: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Give modules a `forward` of their own for a while; the modules, their names and their hooks stay."""
    before = {module: vars(module).get("forward") for module in forwards}
    for module, forward in forwards.items():
        vars(module)["forward"] = forward
    try:
        yield
    finally:
        for module, own in before.items():
            if own is None:
                del vars(module)["forward"]
            else:  # another library had put one there
                vars(module)["forward"] = own


@contextmanager
def class_token_alone(model: nn.Module) -> Iterator[None]:
    """For a while, let the last block compute the class token alone, where that is all that the head reads.

    Its other tokens are read by their keys and values only. So the output of attention, the MLP and the norm after it
    are computed for one token, forward and backward. It is for timm's VisionTransformer with plain blocks; what others
    compute stays.
    """
    vit = next((part for part in model.modules() if type(part) is VisionTransformer), None)
    last = None if vit is None else vit.blocks[-1]
    reads_it_alone = vit is not None and vit.global_pool == "token" and vit.attn_pool is None
    # A forward that another library has put there is not known to do what timm's does.
    if reads_it_alone and type(last) is Block and "forward" not in vars(last):
        with own_forwards({last: partial(_class_token, last)}):
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


def visit_blocks(backbone: Backbone, run: Rest, visit: Callable[[int, Rest], None]) -> Tensor:
    """Run a model once, and let `visit` repeat what follows from each block on, as often as it likes.

    What is held is one block's input at a time.

    Args:
        backbone: if its blocks are not called in turn, what is repeated is the whole pass.
        run: a forward pass of the backbone's model, say `lambda: model(images)`.
        visit: called in front of each block with its place and a function that returns what `run` does, from that
            block on. It may change the block and later ones, if it changes them back.

    Returns:
        What `run` returned.
    """
    replayed = ReplayedPass(backbone, run)
    for place, block in enumerate(_blocks(backbone)):
        replayed.go_to(block)
        visit(place, replayed.rest)
    return replayed.rest()


class ReplayedPass:
    """A forward pass that stops at a module, continues from there later, and meanwhile lets weights change.

    What lies before the block that it has come to is not computed again, so between two stops only weights from that
    block on may change. What is held is one block's input.

    Args:
        backbone: if its blocks are not called in turn, each stop is reached from the start.
        run: a forward pass of the backbone's model, say `lambda: model(images)`.
    """

    def __init__(self, backbone: Backbone, run: Rest) -> None:
        self._backbone, self._run = backbone, run
        self._blocks = _blocks(backbone) if backbone.family.in_turn else []
        self._at: tuple[int, tuple[Any, ...], Mapping[str, Any]] | None = None  # a block's place, and its arguments

    def inputs(self, module: nn.Module) -> tuple[Any, ...]:
        """Return what the first call of a module gets, by the weights as they are now.

        Raises:
            LookupError: if the pass does not reach it from where it has come to.
        """
        self.go_to(module)
        return self._reach(module)[0]

    def go_to(self, module: nn.Module) -> None:
        """Continue to the block that a module lies in, if the pass has not come to it."""
        place = next((place for place, block in enumerate(self._blocks) if module in block.modules()), None)
        if place is not None and (self._at is None or place > self._at[0]):
            self._at = (place, *self._reach(self._blocks[place]))

    def rest(self) -> Tensor:
        """Return what the pass does, computed from the block that it has come to."""
        with nullcontext() if self._at is None else _starting_at(self._backbone, *self._at):
            return self._run()

    def _reach(self, module: nn.Module) -> tuple[tuple[Any, ...], Mapping[str, Any]]:
        def stop(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
            raise _Reached(args, kwargs)

        handle = module.register_forward_pre_hook(stop, with_kwargs=True)
        try:
            self.rest()
        except _Reached as reached:
            return reached.args[0], reached.args[1]
        finally:
            handle.remove()
        raise LookupError("the forward pass does not call the module")


class _Reached(Exception):  # noqa: N818 (no error)
    """Ends a pass at a module, with its arguments."""


class _HandsOn(nn.Module):
    """Stands in for a block that was passed before."""

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


def _blocks(backbone: Backbone) -> list[nn.Module]:
    return [backbone.model.get_submodule(name) for name in backbone.blocks]


@contextmanager
def _starting_at(backbone: Backbone, place: int, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Iterator[None]:
    """For a while, let a block get arguments that were caught, whatever reaches it, and those before it do nothing."""
    passed = dict(zip(backbone.blocks[:place], _blocks(backbone), strict=False))
    block = backbone.model.get_submodule(backbone.blocks[place])
    handle = block.register_forward_pre_hook(lambda *_: (args, dict(kwargs)), prepend=True, with_kwargs=True)
    try:
        for name in passed:
            backbone.model.set_submodule(name, _HandsOn())
        yield
    finally:
        handle.remove()
        for name, module in passed.items():
            backbone.model.set_submodule(name, module)
