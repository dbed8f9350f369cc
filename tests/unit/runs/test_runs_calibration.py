"""A run that decides by `fisher` records how far that is from the empirical Fisher, on training images alone."""

from pathlib import Path

import pytest
from done_runs import do_one, with_settings

from peft_vit.core.adapters import adapted_modules, load_trained
from peft_vit.core.allocation import check_fisher
from peft_vit.core.backbones import load_backbone
from peft_vit.core.config import StudyConfig
from peft_vit.core.methods import METHODS, PrepareContext
from peft_vit.core.records import RunRecord
from peft_vit.data import load_data
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.storage import ADAPTER_FILE, run_folder

pytestmark = pytest.mark.part("importance analysis")


def do(config: StudyConfig, metric: str, folder: Path, **training: object) -> RunRecord:
    config = with_settings(config, "adalora", importance_metric=metric)
    return do_one(with_settings(config, "training", **training), folder)


@pytest.mark.parametrize("class_weights", ["none", "balanced"])
def test_the_check_is_of_the_saved_weights_on_training_images(study, tmp_path, class_weights) -> None:
    do(study("adalora"), "fisher", tmp_path, class_weights=class_weights)
    run = restore_run(tmp_path / "tiny" / "adalora" / "seed_0")
    record = run.record
    data = load_data(record.spec.data, 0)
    rows = data.train.order(0, 0)
    (batch,) = data.train.ordered_batches(24, run.backbone.mean, run.backbone.std)
    counts = [max(1, (data.train.labels == label).sum()) for label in range(10)]
    weights = batch[0].new_tensor([24 / (10 * count) for count in counts]) if class_weights == "balanced" else None
    expected = check_fisher(run.model, batch[0][rows], batch[1][rows], class_weights=weights)
    check = record.fisher_check
    assert check.images == 24  # 32 if there are as many
    assert check.minibatch == pytest.approx(expected.minibatch, rel=1e-4)
    assert check.per_sample == pytest.approx(expected.per_sample, rel=1e-4)
    assert check.rho == pytest.approx(expected.rho)
    assert check.minibatch.keys() == {name for name, rank in record.rank_history[-1].ranks.items() if rank}
    assert record.overhead_s["fisher_check"] > 0


def test_other_metrics_have_no_check(study, tmp_path) -> None:
    record = do(study("adalora"), "sensitivity", tmp_path)
    assert record.fisher_check is None
    assert "fisher_check" not in record.overhead_s


@pytest.mark.part("trainer")
@pytest.mark.parametrize("method", ["qa_lora", "qa_adalora"])
def test_the_balance_is_that_of_the_saved_weights_against_the_backbones_own(study, tmp_path, method) -> None:
    record = do_one(study(method), tmp_path)
    spec = record.spec
    backbone = load_backbone(spec.backbone, image_size=32, num_classes=10, seed=0)
    floats = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    hooks = METHODS[spec.experiment.method].prepare(
        backbone.model, spec.experiment, PrepareContext(total_steps=len(record.steps), seed=0)
    )
    load_trained(backbone.model, run_folder(tmp_path, spec) / ADAPTER_FILE)
    data = load_data(spec.data, 0)
    (batch,) = data.train.ordered_batches(24, backbone.mean, backbone.std)  # all of them; 32 if there are as many
    for _, module in adapted_modules(backbone.model):
        module.drop_float()
    expected = hooks[-1].validate_quantization_adaptation_balance(backbone.model, reference=floats, images=batch[0])
    (row,) = record.quantization.balance
    assert row == pytest.approx({**expected, "step": 6.0, "quantized_share": 1.0}, rel=1e-3)
    assert expected["error_removed_in_outputs"] != 0
    assert record.overhead_s["balance"] > 0
