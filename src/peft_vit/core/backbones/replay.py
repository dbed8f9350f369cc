"""Forward passes that are caught, and taken up again at a block, whatever the class of the model.

A hook catches the arguments that reach a block, and the rest of the pass is the model's own: blocks before the caught
one hand their input on, and it gets those arguments again. So no forward pass is written a second time here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

from torch import Tensor, nn

from peft_vit.core.backbones.backbone import Backbone

Rest = Callable[[], Tensor]


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
