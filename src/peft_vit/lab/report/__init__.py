"""Reports from records, without torch: the same records give the same bytes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from peft_vit.base.extras import require_extra

if TYPE_CHECKING:
    from peft_vit.lab.report.build import ReportFiles, build_report

__all__ = ["ReportFiles", "build_report"]


def __getattr__(name: str) -> Any:
    """Import on first use: tables in a terminal need nothing that draws.

    Raises:
        UserError: if what draws is not installed.
    """
    if name in __all__:
        require_extra("report", "a report")
        return getattr(import_module("peft_vit.lab.report.build"), name)
    raise AttributeError(f"module 'peft_vit.lab.report' has no attribute {name!r}")
