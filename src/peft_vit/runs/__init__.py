"""One run: from its specification to its record and its adapter; the only place where configuration becomes objects."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft_vit.runs.execute import run_one

__all__ = ["run_one"]


def __getattr__(name: str) -> Any:
    """Import on first use, so that what only reads a study's state needs no torch."""
    if name in __all__:
        from peft_vit.runs import execute

        return getattr(execute, name)
    raise AttributeError(f"module 'peft_vit.runs' has no attribute {name!r}")
