"""Measures over several studies, on planted records with a known answer."""

from typing import Any

import numpy as np
import planted
import pytest

from experiments.hypotheses.conclusions import MarkedFinding
from experiments.hypotheses.registry import all_findings, load_registry
from peft_vit.core.records import ImportanceEntry, RunRecord

pytestmark = pytest.mark.part("analyzer")

EXPERIMENTS = planted.experiments()
ADALORA = EXPERIMENTS["adalora_proportional_magnitude"]
SITES = planted.sites()


def only(records: list[RunRecord], hypothesis: str) -> MarkedFinding:
    by_study = all_findings(planted.studies_of(records), load_registry())
    (finding,) = (one for of in by_study.values() for one in of if one.sentence.id == hypothesis)
    return finding


def scores(values: dict[str, float]) -> list[ImportanceEntry]:
    return [ImportanceEntry(step=1, scores=dict.fromkeys(values, 1.0)), ImportanceEntry(step=2, scores=values)]


def with_parameters(record: RunRecord, final: int) -> RunRecord:
    return record.model_copy(update=planted.counts(final))


def on(data: str, seed: int, order: tuple[int, ...], **named: Any) -> RunRecord:
    history = scores({site.name: float(value) for site, value in zip(SITES, order, strict=False)})
    return planted.record(
        ADALORA,
        seed,
        0.8,
        study=f"on_{data}",
        provenance_changes={"data_sha256": data * 64},
        changes={"importance_history": history},
        **named,
    )


def test_agreement_of_data_sets() -> None:
    records = [on("a", seed, (1, 2, 3, 4, 5)) for seed in range(3)]
    records += [on("b", seed, (2, 1, 3, 4, 5)) for seed in range(1, 4)]
    finding = only(records, "data-sets-agree")
    assert finding.by_seed == pytest.approx({1: 0.9, 2: 0.9})
    assert finding.subject == f"{ADALORA.name} on on_a and on_b"


@pytest.mark.parametrize(
    ("changes", "agree"),
    [({"update_frequency": 4, "warmup_steps": 8, "final_steps": 20}, True), ({"total_rank_budget": 300}, False)],
)
def test_data_sets_may_differ_in_when_ranks_were_decided_but_not_in_the_budget(
    changes: dict[str, int], agree: bool
) -> None:
    other = [on("b", seed, (2, 1, 3, 4, 5)) for seed in range(3)]
    adalora = ADALORA.adalora.model_copy(update=changes)
    experiment = ADALORA.model_copy(update={"adalora": adalora})
    other = [planted.asking(r, experiment=experiment) for r in other]
    finding = only([*(on("a", seed, (1, 2, 3, 4, 5)) for seed in range(3)), *other], "data-sets-agree")
    assert (finding.verdict != "no data") == agree


def test_data_sets_are_told_apart_by_their_images_and_smoke_runs_stand_apart() -> None:
    same = [on("a", 0, (1, 2, 3))] + [planted.asking(r, study="other") for r in [on("a", 0, (1, 2, 3))]]
    assert only(same, "data-sets-agree").verdict == "no data"
    assert only([on("a", 0, (1, 2, 3)), on("b", 0, (1, 2, 3), smoke=True)], "data-sets-agree").verdict == "no data"


def varied(gains: list[int], seeds: int, scatter: float = 0.0) -> list[RunRecord]:
    """Return experiments whose scores vary the more the later they stand, with gains in images of 600."""
    section = {"total_rank_budget": 288, "allocation_strategy": "proportional", "update_frequency": 6}
    made = planted.experiments_of(
        *(
            {
                "name": f"e{i:02}",
                "method": "adalora",
                "adalora": {
                    **section,
                    "warmup_steps": 12,
                    "importance_metric": "magnitude",
                    "total_rank_budget": 288 + i,
                },
            }
            for i in range(len(gains))
        )
    )
    rng = np.random.default_rng(0)
    records = [
        with_parameters(planted.record(EXPERIMENTS[f"lora_r{rank}"], seed, 450 / 600), 1000 * rank)
        for seed in range(seeds)
        for rank in (1, 2)
    ]
    for seed in range(seeds):
        for i, (gain, one) in enumerate(zip(gains, made.values(), strict=True)):
            values = {site.name: 2.0 + i if site.matrix == "query" else 1.0 for site in SITES}
            accuracy = (450 + gain + scatter * rng.normal()) / 600
            record = planted.record(one, seed, accuracy, changes={"importance_history": scores(values)})
            records.append(with_parameters(record, 1500))
    return records


def test_gain_where_importance_varies() -> None:
    finding = only(varied([3, 5, 4, 9, 7], 2), "gain-where-importance-varies")
    expected = {"e03 in quickstart - e00 in quickstart": 6 / 600, "e04 in quickstart - e01 in quickstart": 2 / 600}
    assert finding.by_seed == pytest.approx(expected)
    assert finding.note == "over 5 experiments; in no pair: e02 in quickstart"
    one = only(varied([3], 2), "gain-where-importance-varies")
    assert one.outcome == "needs scores and gains of at least 2 experiments, there are 1"
    assert only(varied([*range(12)], 1), "gain-where-importance-varies").verdict == "supported"
    assert only(varied([*range(12, 0, -1)], 1), "gain-where-importance-varies").verdict == "refuted"


def test_many_seeds_of_few_experiments_do_not_show_where_adaptive_ranks_gain() -> None:
    finding = only(varied([1, 20, 40], 8, scatter=1.0), "gain-where-importance-varies")
    assert finding.verdict == "not decided", "three gains rise by chance in one of six worlds, in every seed of it"
    assert len(finding.by_seed) == 1
