"""What a record holds of predictions, updates left out and forward passes; older studies stay as they are."""

import json
from collections import Counter

import numpy as np
import pytest
import torch
from done_runs import do, specs, trained_again, with_settings
from scipy.special import softmax
from written_runs import planned, read_without

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import adapted_modules, current_ranks
from peft_vit.core.backbones import describe
from peft_vit.core.config import MeasuresConfig, StudyConfig
from peft_vit.core.training import Checkpoints, RuntimeConfig
from peft_vit.core.training.images import LabelledImages
from peft_vit.core.training.metrics import predict
from peft_vit.data import load_data, make_splits, open_index
from peft_vit.runs.costs.estimate import EstimateRequest, Workload, estimate_runs
from peft_vit.runs.costs.timing_run import timing_run
from peft_vit.runs.execute import run_one
from peft_vit.runs.measures import removal_and_latency
from peft_vit.runs.measures.removal_and_latency import removal_images
from peft_vit.runs.records.run_rows import outcome_digest
from peft_vit.runs.records.storage import STUDY_FILE, read_record, read_study_file, run_folder, write_study_file
from peft_vit.runs.scheduling.scheduler import go_on, study_file

pytestmark = pytest.mark.part("runner")
ASKED = MeasuresConfig(removal_images=7, latency_batches=(1, 30))


def asking(config: StudyConfig, measures: MeasuresConfig = ASKED) -> StudyConfig:
    return config.model_copy(update={"measures": measures})


def test_predictions_are_of_the_one_reading_of_test(study, tmp_path) -> None:
    (record,) = do(asking(study("lora"), MeasuresConfig(logits=True)), tmp_path)
    index = open_index(record.spec.data)
    images = make_splits(index, record.spec.data, record.spec.seed).test
    predictions = record.predictions
    assert predictions.images == images.tolist()
    assert predictions.labels == index.labels[images].tolist()
    backbone = trained_again(record, tmp_path)
    batches = load_data(record.spec.data, 0).test.open().ordered_batches(30, backbone.mean, backbone.std)
    logits, _ = predict(backbone.model, batches, precision="fp32")
    probability = softmax(logits.astype(np.float64), axis=1)
    np.testing.assert_allclose(predictions.logits, logits, rtol=0, atol=1e-5)
    assert np.float32(predictions.logits).argmax(1).tolist() == predictions.predicted
    assert predictions.predicted == probability.argmax(1).tolist()
    assert predictions.probability == pytest.approx(probability.max(1), abs=1e-6)
    hits = np.equal(predictions.predicted, predictions.labels)
    assert hits.mean() == record.test.accuracy
    assert 0 < hits.sum() < 30  # or labels and predictions could be the same list
    assert read_record(run_folder(tmp_path, record.spec) / "record.json") == record


def test_what_is_not_asked_for_is_not_measured(study, tmp_path) -> None:
    (record,) = do(study("lora"), tmp_path)
    assert record.removal is None
    assert record.latency_s == {}
    assert record.predictions.logits is None
    assert "logits" not in record.predictions.model_dump_json()  # or digests of outcomes would be others
    assert not {"removal", "latency"} & record.overhead_s.keys()


def test_updates_of_the_peft_tuner_are_left_out_and_merged_too(study, tmp_path) -> None:
    pytest.importorskip("peft")
    for record in do(asking(study("peft_lora", "peft_adalora")), tmp_path):
        final = record.rank_history[-1].ranks
        assert record.removal.site_loss_rise.keys() == {name for name, rank in final.items() if rank}
        assert {name.rsplit(".")[-1] for name in final} == {"qkv", "out", "fc1", "fc2"}
        assert any(record.removal.site_loss_rise.values())
        assert list(record.latency_s) == [1, 30]
        assert record.warnings == []


def test_removal_is_measured_at_the_chosen_weights_on_the_drawn_images(study, tmp_path) -> None:
    (record,) = do(asking(study("qa_adalora")), tmp_path)
    backbone = trained_again(record, tmp_path)
    assert current_ranks(backbone.model) == record.rank_history[-1].ranks
    drawn = removal_images(load_data(record.spec.data, 0).validation, record.spec.data.split_seed, 7)

    def loss() -> float:
        batches = drawn.ordered_batches(32, backbone.mean, backbone.std)
        logits, labels = predict(backbone.model, batches, precision="fp32")
        return -np.log(softmax(logits.astype(np.float64), axis=1)[np.arange(7), labels]).mean()

    whole = loss()
    assert record.removal.loss == pytest.approx(whole, abs=1e-6)
    with torch.no_grad():
        for name, module in adapted_modules(backbone.model):
            if name.endswith("fc2"):
                for _, adapter in module.adapters():
                    adapter.lora_B.zero_()
    assert record.removal.group_loss_rise["mlp"] == pytest.approx(loss() - whole, abs=1e-6)
    assert abs(record.removal.group_loss_rise["mlp"]) > 1e-4


def test_the_images_are_the_same_in_every_run_and_each_class_has_its_share() -> None:
    labels = np.repeat([0, 1, 2], [60, 30, 10])  # sorted, as the images of a folder are
    images = LabelledImages(np.arange(100, dtype=np.uint8)[:, None, None, None], labels, np.arange(500, 600))
    drawn, again, other = (removal_images(images, seed, 20) for seed in (4, 4, 5))
    assert drawn.positions.tolist() == again.positions.tolist() != other.positions.tolist()
    assert Counter(drawn.labels.tolist()) == {0: 12, 1: 6, 2: 2}
    assert drawn.pixels is images.pixels  # none is copied
    ((shown, _),) = drawn.ordered_batches(20, (0, 0, 0), (1, 1, 1))
    assert (drawn.positions - 500).tolist() == (255 * shown[:, 0, 0, 0]).round().tolist()
    assert (labels[drawn.positions - 500] == drawn.labels).all()
    assert removal_images(images, 4, 1000).positions.tolist() == images.positions.tolist()


def test_no_rank_at_all_is_said(study, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(removal_and_latency, "update_ranks", lambda model: {"blocks.0.attn.query": 0})
    (record,) = do(asking(study("lora")), tmp_path)
    assert record.removal is None
    assert record.warnings == ["measures.removal_images has no effect: no module has any rank left"]


@pytest.mark.parametrize(
    ("method", "qa_lora", "is_merged"),
    [
        ("linear", {}, True),
        ("full", {}, True),
        ("lora", {}, True),
        ("adalora", {}, True),
        ("qa_lora", {}, True),
        ("qa_lora", {"use_group_quantization": False}, False),
    ],
)
def test_what_is_timed_computes_what_was_tested(study, tmp_path, monkeypatch, method, qa_lora, is_merged) -> None:
    timed = []
    monkeypatch.setattr(
        removal_and_latency, "forward_s", lambda model, images, precision: timed.append((model, images))
    )
    config = with_settings(study(method), "qa_lora", **qa_lora) if qa_lora else study(method)
    (spec,) = specs(config, tmp_path)
    (record,) = do(config, tmp_path)
    backbone, data = trained_again(record, tmp_path), load_data(spec.data, 0)
    runtime = RuntimeConfig(torch.device("cpu"), "fp32", backbone.mean, backbone.std)
    before = {name: tensor.clone() for name, tensor in backbone.model.state_dict().items()}
    timing = spec.model_copy(update={"measures": ASKED})
    removal_and_latency.time_forward(backbone, data, timing, runtime)
    assert [len(images) for _, images in timed] == [1, 30]
    model, images = timed[1]
    assert torch.equal(images[:10], images[20:])
    assert any(module.sites for _, module in adapted_modules(model)) != is_merged
    with torch.inference_mode():
        torch.testing.assert_close(model.eval()(images), backbone.model.eval()(images), atol=2e-3, rtol=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.model.state_dict().items())
    assert any(module.sites for _, module in adapted_modules(backbone.model)) == (method not in ("linear", "full"))


def test_an_attempt_that_ends_in_a_measure_is_followed_by_one_that_measures_anew(study, tmp_path, monkeypatch) -> None:
    (spec,) = specs(asking(study("adalora")), tmp_path)
    whole = run_one(spec).record
    with monkeypatch.context() as patched:
        patched.setattr(
            removal_and_latency, "measure_ablation", lambda *_, **__: (_ for _ in ()).throw(OSError(5, "x"))
        )
        failed = run_one(spec, checkpoints=Checkpoints(tmp_path / "run", 0)).record
    assert (failed.status, failed.failure, failed.removal) == ("failed", "io", None)
    again = run_one(spec, checkpoints=Checkpoints(tmp_path / "run", 0)).record
    assert again.removal == whole.removal
    assert again.predictions == whole.predictions
    assert outcome_digest(again) == outcome_digest(whole)
    assert outcome_digest(again.model_copy(update={"latency_s": {1: 9.0}})) == outcome_digest(whole)
    for field, other in (("removal", None), ("predictions", None)):
        assert outcome_digest(again.model_copy(update={field: other})) != outcome_digest(whole)


def test_a_run_without_measures_is_the_run_from_before_there_were_any(study, tmp_path) -> None:
    (record,) = do(study("lora"), tmp_path)
    spec = record.spec
    assert asking(spec).digest() != spec.digest()
    file = run_folder(tmp_path, spec) / "record.json"
    written = json.loads(file.read_text())
    del written["spec"]["measures"]
    file.write_text(json.dumps(written))
    assert read_record(file).spec == spec
    assert planned(study("lora"), tmp_path).runs[0].done
    for field in ("fisher_check", "bit_allocation"):
        assert read_without(field, record, tmp_path) == record
    assert read_without("predictions", record, tmp_path).predictions is None


def test_a_study_begun_before_there_were_measures_goes_on(study, tmp_path) -> None:
    config = study("lora")

    def with_measures(config):
        return study_file(config, {"lora/seed_0"}, smoke=False, data_sha256="d")

    write_study_file(tmp_path, with_measures(config))
    content = json.loads((tmp_path / STUDY_FILE).read_text())
    del content["configuration"]["measures"]
    (tmp_path / STUDY_FILE).write_text(json.dumps(content))
    assert go_on(tmp_path, read_study_file(tmp_path), with_measures(config), source="s.yaml").configuration == config
    with pytest.raises(UserError, match="was begun with another configuration") as caught:
        go_on(tmp_path, read_study_file(tmp_path), with_measures(asking(config)), source="s.yaml")
    assert "+measures.removal_images: 7" in caught.value.details


@pytest.mark.usefixtures("cache")
def test_plans_count_what_is_measured(study, monkeypatch, tmp_path) -> None:
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path))
    monkeypatch.setattr("peft_vit.runs.costs.estimate.product_throughput", lambda *_, **__: 1e6)
    config = study("linear", "lora")
    shape, index = describe(config.backbone, 32), open_index(config.data)
    workload = Workload(shape, 32, 1, torch.device("cpu"), "fp32", 1, 24, 20, 30)
    splits = make_splits(index, config.data, 0)

    def seconds(measures: MeasuresConfig) -> list[float]:
        planned = specs(asking(config, measures), tmp_path)
        runs = [EstimateRequest(spec, 6, spec, spec.digest(), None) for spec in planned]
        return [cost.seconds for cost in estimate_runs(runs, workload)]

    def passes(measures: MeasuresConfig) -> list[float]:
        """Return the images that go through the model beyond those of a run without measures."""
        an_image = 1.8 * shape.multiply_adds / 1e6
        return [(a - b) / an_image for a, b in zip(seconds(measures), seconds(MeasuresConfig()), strict=True)]

    assert passes(MeasuresConfig(latency_batches=(1, 8))) == pytest.approx([225, 225])
    assert len(shape.sites) == 6 * 6
    removal = (1 + 6 * (1 + 2 + 3 + 4 + 5 + 6) / 6 + 3) * 8  # all updates; of each block's sites the rest; the groups
    assert passes(MeasuresConfig(removal_images=8)) == pytest.approx([0, 25 * 8])
    assert removal == 25 * 8
    assert passes(MeasuresConfig(removal_images=500))[1] == pytest.approx(25 * 20)  # there are no more
    (spec,) = specs(asking(study("lora", batch_size=1), MeasuresConfig(removal_images=20)), tmp_path)
    kind = timing_run(spec, 48, shape, index, splits)
    assert kind.data.validation_images == 20  # without, twice the ten classes; and the measure is a part of it
    assert kind.measures == spec.measures
