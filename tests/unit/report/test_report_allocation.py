"""A budget is shown in its unit: ranks as ranks, parameters never as ranks."""

import planted

from peft_vit.analysis.allocation import allocations
from peft_vit.records import RankEntry
from peft_vit.report.allocation_tables import allocation_table

ADALORA = planted.experiments()["adalora_proportional_magnitude"]


def test_the_budget_stands_in_its_unit() -> None:
    names = [site.name for site in planted.sites()]
    settings = ADALORA.adalora.model_copy(update={"total_rank_budget": None, "total_parameter_budget": 83_000})
    in_parameters = ADALORA.model_copy(update={"name": "in_parameters", "adalora": settings})
    one_each = [
        RankEntry(step=0, budget=83_000, ranks=dict.fromkeys(names, 1), unit="parameters", cost=82_944)  # 72 x 1,152
    ]
    records = [
        planted.record(ADALORA, 0, 0.8),
        planted.record(in_parameters, 0, 0.8, changes={"rank_history": one_each}),
    ]
    study = planted.study_of(records)
    table = allocation_table(allocations(study))
    column = table.columns.index("ranks / budget")
    assert {row[0]: row[column] for row in table.rows} == {
        ADALORA.name: "288 / 288",
        "in_parameters": "72 ranks: 82,944 / 83,000 parameters",
    }
    data = {row["experiment"]: (row["used"], row["spent"], row["budget"], row["unit"]) for row in table.data}
    assert data == {ADALORA.name: (288, 288, 288, "ranks"), "in_parameters": (72, 82_944, 83_000, "parameters")}
