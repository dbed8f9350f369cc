"""Tables of layers: whether studies agree on which matter, and whether adaptive ranks paid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from peft_vit.deploy.page.document import Table
from peft_vit.deploy.page.formatting import fixed, plain
from peft_vit.deploy.page.tables import Column, table
from peft_vit.lab.analysis import Allocation
from peft_vit.lab.analysis.comparison import SAME_SIZE
from peft_vit.lab.report.columns import FAMILY_NOTE
from peft_vit.lab.report.method_tables import differences_table


def study_agreement_table(agreements: Sequence[Mapping[str, Any]]) -> Table:
    """Return whether studies, with their own images, agree on which sites matter; rows of `study_agreements`."""

    def images(row: Mapping[str, Any]) -> str:
        backbone = "" if row["same_backbone"] else "; other backbones or weights"
        return " / ".join(dict.fromkeys((row["images"], row["other_images"]))) + backbone

    return table(
        "importance_across_studies",
        "Do data sets agree on what matters?",
        agreements,
        [
            Column("study", "study", plain),
            "experiment",
            Column("other study", "other_study", plain),
            Column("its experiment", "other_experiment"),
            "metric",
            Column("images", images),
            Column("modules", "sites"),
            Column("Spearman's rho", "rho", fixed),
        ],
        "Rank correlation of the mean final relative scores of the modules that both have, for experiments of one "
        "method, metric and strategy. It describes these runs; there is no test. With other backbones, modules share "
        "no more than their place.",
        data=agreements,
    )


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
