"""LoRA whose ranks a rule chooses: by the head of the start, recorded, restored, resumed to the bit."""

import pytest
import torch
from done_runs import do_one, restored, with_settings

from peft_vit.core.adapters import current_ranks
from peft_vit.core.backbones import load_run_backbone
from peft_vit.core.config import StartingRanksConfig
from peft_vit.core.training import StartingRanks

pytestmark = pytest.mark.part("controller")


@pytest.fixture
def ruled(study):
    """Make the tiny study of LoRA at the ranks of a rule."""

    def make(**settings):
        settings = {"calibration_images": 24} | settings if settings["rule"] == "gradient" else settings
        config = study("lora", head_start="probe")
        return with_settings(config, "lora", rank=None, ranks=StartingRanksConfig(**settings))

    return make


def test_a_run_below_one_rank_a_site_sees_the_probes_head_and_is_recorded_and_restored(
    ruled, tmp_path, monkeypatch
) -> None:
    seen = []
    begin = StartingRanks.begin
    monkeypatch.setattr(
        StartingRanks,
        "begin",
        lambda self, model, before: (seen.append(model.head.weight.clone()), begin(self, model, before))[1],
    )
    record = do_one(ruled(rule="gradient", budget=20), tmp_path)
    (entry,), (scores,) = record.rank_history, record.importance_history
    assert (entry.step, entry.budget, entry.unit, entry.spent, scores.step) == (0, 20, "ranks", 20, 0)
    assert len(entry.ranks) == len(scores.scores) == 36
    fresh = load_run_backbone(record.spec, len(record.class_names)).model
    assert not torch.equal(seen[0], fresh.head.weight)  # the probe was fitted before
    with_rank = {name for name, rank in entry.ranks.items() if rank}
    assert 1 <= len(with_rank) <= 20
    assert min(scores.scores[name] for name in with_rank) > 0
    assert record.overhead_s["starting_ranks"] > 0
    shapes = {site.name: site.in_features + site.out_features for site in record.sites}
    values = sum(rank * shapes[name] for name, rank in entry.ranks.items())
    assert record.parameters.initial == record.parameters.head + values

    assert current_ranks(restored(record, tmp_path).model) == entry.ranks
