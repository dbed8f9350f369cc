"""What a watcher reads after each step equals what the model's tensors say, whatever the method."""

import allocation_runs
import numpy as np
import pytest
import qa_lora_settings
from timm.models.vision_transformer import VisionTransformer

from peft_vit.core.adapters import adapted_modules
from peft_vit.core.adapters.low_rank import SiteAdapter
from peft_vit.core.adapters.peft_layers import peft_ranks
from peft_vit.core.config import ExperimentConfig, LoraConfig, PeftAdaLoraConfig, TrainingConfig
from peft_vit.core.methods import METHODS, PrepareContext
from peft_vit.core.training import Progress, train

pytestmark = pytest.mark.part("trainer")

ADALORA = allocation_runs.config(
    total_rank_budget=24, initial_budget=48, importance_metric="sensitivity", final_steps=3
)
QA_LORA = qa_lora_settings.config(
    quantization_type="int4", quantization_schedule="linear", quantization_end_step=5, rank=2
)
TRAINING = TrainingConfig(epochs=3, batch_size=8, learning_rate=3e-3)


def watched(model: VisionTransformer, data, runtime, method: str, read, **sections) -> list[tuple[Progress, object]]:
    """Train, and return what was reported beside what `read` finds in the model at that moment."""
    experiment = ExperimentConfig(name="one", method=method, training=TRAINING, **sections)
    hooks = METHODS[experiment.method].prepare(model, experiment, PrepareContext(total_steps=9, seed=0))
    reports = []
    train(model, data(), TRAINING, runtime, seed=0, hooks=hooks, on_progress=lambda p: reports.append((p, read(model))))
    assert [(p.step, p.total_steps) for p, _ in reports] == [(s, 9) for s in (1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9, 9)]
    assert [p.validation_score is None for p, _ in reports] == [True] * 3 + [False] * 9
    return reports


def mean_rows(model) -> float:
    rows = [len(module.lora_A) for module in model.modules() if isinstance(module, SiteAdapter)]
    return sum(rows) / len(rows)


def stored_bits(model) -> float:
    bits = weights = 0
    for _, layer in adapted_modules(model):
        floats = [] if layer.weight is None else [layer.weight]
        stored = [layer.quantized.codes, layer.quantized.scales, layer.quantized.offsets, *floats]
        bits += sum(8 * tensor.element_size() * tensor.numel() for tensor in stored)
        weights += layer.in_features * layer.out_features
    return bits / weights


def test_mean_rank_follows_every_change(tiny_vit, data, runtime) -> None:
    reports = watched(tiny_vit(), data, runtime, "adalora", mean_rows, adalora=ADALORA)
    assert all(progress.mean_rank == rank and progress.mean_bits is None for progress, rank in reports)
    assert (reports[0][0].mean_rank, reports[-1][0].mean_rank) == (4.0, 2.0)  # 48, then 24 ranks on 12 sites


def test_mean_bits_count_the_float_weight_until_the_schedule_ends(tiny_vit, data, runtime) -> None:
    reports = watched(tiny_vit(), data, runtime, "qa_lora", stored_bits, qa_lora=QA_LORA)
    assert all(progress.mean_bits == pytest.approx(bits) and progress.mean_rank == 2 for progress, bits in reports)
    # 4 bits, and a scale and an offset of 16 bits for 16 weights
    assert {round(progress.mean_bits, 6) for progress, _ in reports} == {38.0, 6.0}
    assert [progress.mean_bits for progress, _ in reports if progress.step == 5] == [6.0]


def test_masks_of_peft_count_as_ranks(tiny_vit, data, runtime) -> None:
    pytest.importorskip("peft")
    config = PeftAdaLoraConfig(initial_rank=4, target_rank=2, warmup_steps=1, update_frequency=2, final_steps=2)
    reports = watched(tiny_vit(), data, runtime, "peft_adalora", peft_ranks, peft_adalora=config)
    assert all(progress.mean_rank == np.mean(list(ranks.values())) for progress, ranks in reports)
    assert len({progress.mean_rank for progress, _ in reports}) > 2


def test_without_adapters_there_is_neither(tiny_vit, data, runtime) -> None:
    for method, sections, rank in (("linear", {}, None), ("lora", {"lora": LoraConfig(rank=3)}, 3.0)):
        reports = watched(tiny_vit(), data, runtime, method, lambda model: None, **sections)
        assert {(progress.mean_rank, progress.mean_bits) for progress, _ in reports} == {(rank, None)}
