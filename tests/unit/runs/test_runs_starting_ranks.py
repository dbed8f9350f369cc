"""LoRA whose ranks a rule chooses: recorded and restored."""

import pytest
from done_runs import do_one, restored, with_settings

from peft_vit.core.adapters import current_ranks
from peft_vit.core.config import StartingRanksConfig

pytestmark = pytest.mark.part("controller")


def test_a_run_below_one_rank_a_site_is_recorded_and_restored(study, tmp_path) -> None:
    rule = StartingRanksConfig(rule="stable_rank", budget=20)
    record = do_one(with_settings(study("lora", head_start="probe"), "lora", rank=None, ranks=rule), tmp_path)
    (entry,), (scores,) = record.rank_history, record.importance_history
    assert (entry.step, entry.budget, entry.unit, entry.spent, scores.step) == (0, 20, "ranks", 20, 0)
    assert len(entry.ranks) == len(scores.scores) == 36
    with_rank = {name for name, rank in entry.ranks.items() if rank}
    assert 1 <= len(with_rank) <= 20
    assert min(scores.scores[name] for name in with_rank) > 0
    assert record.overhead_s["starting_ranks"] > 0
    shapes = {site.name: site.in_features + site.out_features for site in record.sites}
    values = sum(rank * shapes[name] for name, rank in entry.ranks.items())
    assert record.parameters.initial == record.parameters.head + values

    assert current_ranks(restored(record, tmp_path).model) == entry.ranks
