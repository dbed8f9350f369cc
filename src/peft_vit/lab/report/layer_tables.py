"""The table of layers: whether adaptive ranks paid."""

from __future__ import annotations

from collections.abc import Sequence

from peft_vit.deploy.page.document import Table
from peft_vit.lab.analysis import Allocation
from peft_vit.lab.analysis.comparison import SAME_SIZE
from peft_vit.lab.report.columns import FAMILY_NOTE
from peft_vit.lab.report.method_tables import differences_table


def against_fixed_table(allocations: Sequence[Allocation]) -> Table:
    """Return whether adaptive ranks paid."""
    return differences_table(
        "allocation_against_fixed",
        "Adaptive against fixed ranks at equal trainable parameters",
        [a.against_fixed for a in allocations],
        "Test accuracy minus that of fixed-rank LoRA, read off the line through the same seed's LoRA "
        "runs at the same number of trainable parameters (linear in its logarithm, no extrapolation; "
        f"within {100 * SAME_SIZE:.0f} % is equal). {FAMILY_NOTE}",
    )
