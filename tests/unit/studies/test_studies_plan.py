"""A plan counts, checks and estimates every run before the first; what is done is skipped, what changed is refused."""

import weakref

import numpy as np
import pytest
from PIL import Image
from written_runs import planned, run_and_write

from peft_vit.base.errors import UserError
from peft_vit.core.config import PROBE_L2
from peft_vit.core.tasks import metric_of
from peft_vit.data import ImageIndex, make_splits
from peft_vit.runs.records.storage import read_record, run_folder, write_record, write_study_file
from peft_vit.runs.scheduling.plan import smoke_study
from peft_vit.runs.scheduling.scheduler import study_file

pytestmark = pytest.mark.part("runner")


def with_settings(config, place, sections):
    """Return the study with other settings in some sections of one experiment."""
    experiments = list(config.experiments)
    update = {name: getattr(experiments[place], name).model_copy(update=own) for name, own in sections.items()}
    experiments[place] = experiments[place].model_copy(update=update)
    return config.model_copy(update={"experiments": tuple(experiments)})


def with_data(config, seeds=(0,), **settings):
    return config.model_copy(update={"data": config.data.model_copy(update=settings), "seeds": tuple(seeds)})


def toy(monkeypatch, few: int, many: int) -> ImageIndex:
    """Have plans find so many images of two classes."""
    labels = np.repeat([0, 1], [few, many])
    index = ImageIndex(
        name="toy",
        labels=labels,
        class_names=("few", "many"),
        official_test=None,
        licence="none",
        sha256="0" * 64,
        read=lambda i: Image.fromarray(np.full((8, 8), 4 * i, np.uint8)),
    )
    monkeypatch.setattr("peft_vit.runs.scheduling.plan.open_index", lambda *_, **__: index)
    return index


def test_every_run_is_counted_and_estimated(study, tmp_path, tmp_path_factory, monkeypatch) -> None:
    config = study("linear", "lora", seeds=(3, 4))
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path_factory.mktemp("nothing_measured")))
    plan = planned(config, tmp_path)
    assert [run.spec.run_id for run in plan.runs] == [
        f"tiny/{name}/seed_{seed}" for name in ("linear", "lora") for seed in (3, 4)
    ]
    assert plan.pending == plan.runs
    assert [run.total_steps for run in plan.runs] == [*2 * [len(PROBE_L2)], 6, 6]  # of a probe, its fits
    assert all(run.estimate.seconds > 0 and run.estimate.peak_memory_bytes > 1e8 for run in plan.runs)
    assert {run.estimate.basis for run in plan.runs} == {"estimate"}
    assert list(tmp_path.iterdir()) == []  # planning writes nothing


def test_done_runs_are_skipped_and_estimate_the_others_and_their_records_are_not_held(
    study, tmp_path, monkeypatch
) -> None:
    """A thousand of them, with all their steps, would take gigabytes."""
    config, held = study("linear", seeds=(3, 4, 5)), []
    records = [run_and_write(run.spec, tmp_path) for run in planned(config, tmp_path).runs[:2]]

    def read(file):
        record = read_record(file)
        assert [reference() for reference in held[:-1]] == [None] * len(held[:-1])  # the last may still be looked at
        held.append(weakref.ref(record))
        return record

    monkeypatch.setattr("peft_vit.runs.scheduling.plan.read_record", read)
    plan = planned(config, tmp_path)
    assert [run.done for run in plan.runs] == [True, True, False]
    assert [run.spec.seed for run in plan.pending] == [5]
    assert {run.estimate.basis for run in plan.runs} == {"records"}
    assert plan.pending[0].estimate.seconds == pytest.approx(np.median([record.seconds for record in records]))
    assert [reference() for reference in held] == [None] * 2


def test_a_split_that_only_another_seed_cannot_have_is_refused_by_the_plan(study, tmp_path, monkeypatch) -> None:
    """Of 10 and 30 images, the second test image is of either class by lot: 9 or 8 of the 10 are left to train on."""
    index, config = toy(monkeypatch, 10, 30), study("linear")
    sizes = {"train_images": None, "test_images": 2, "validation_images": 4, "test_split": "per_seed"}
    few = with_data(config, shots_per_class=1, **sizes).data
    lacking = {seed: make_splits(index, few, seed).test.min() < 10 for seed in range(20)}
    bad, good = (next(seed for seed, lacks in lacking.items() if lacks == wanted) for wanted in (True, False))
    assert len(planned(with_data(config, [good], shots_per_class=9, **sizes), tmp_path).runs) == 1
    with pytest.raises(UserError, match=rf"data\.shots_per_class: with seed {bad}: 9 .* are too many: 8 .* 'few'"):
        planned(with_data(config, [good, bad], shots_per_class=9, **sizes), tmp_path)


def test_a_plan_says_which_class_is_in_no_split_and_with_which_seeds(study, tmp_path, monkeypatch) -> None:
    """Of 3 and 57 images, 10 are tested with one or none of class 'few', by lot, and 10 validated with none or one."""
    index = toy(monkeypatch, 3, 57)
    sizes = {"train_images": None, "validation_images": 10, "test_images": 10, "test_split": "per_seed"}
    config = with_data(study("linear"), range(6), **sizes)
    splits = [make_splits(index, config.data, seed) for seed in config.seeds]
    notices = []
    for name in ("test", "validation"):
        lacking = [
            str(seed) for seed, split in enumerate(splits) if not (index.labels[getattr(split, name)] == 0).any()
        ]
        assert 0 < len(lacking) < 6
        notices.append(
            f"Images: no {name} image is of class 'few'; balanced {name} accuracy is the mean over 1 of 2 classes "
            f"(seen with seed {', '.join(lacking)})"
        )
    assert sorted(planned(config, tmp_path).notices) == notices


def test_auto_is_the_metric_that_the_images_ask_for_whatever_is_trained_on(study, tmp_path, monkeypatch) -> None:
    for few, decides in ((10, "accuracy"), (9, "balanced_accuracy")):
        toy(monkeypatch, few, 30)
        sizes = {"train_images": None, "validation_images": 4, "test_images": 4, "shots_per_class": 2}
        for asked, settled in (("auto", decides), ("accuracy", "accuracy"), (None, "accuracy")):
            training = {} if asked is None else {"metric": asked}
            config = with_data(study("linear", **training), [0], train_subset="per_seed", **sizes)
            plan = planned(config, tmp_path)
            assert plan.study.experiments[0].training.metric == settled
            assert metric_of(plan.runs[0].spec).name == settled
            plain = with_data(study("linear"), [0], train_subset="per_seed", **sizes)
            same = plan.runs[0].spec.digest() == planned(plain, tmp_path).runs[0].spec.digest()
            assert same == (settled == "accuracy")  # so runs of before stay what they are


def test_a_plan_refuses_what_its_first_run_would(study, tmp_path) -> None:
    for i in range(30):
        for split in ("train", "test"):
            file = tmp_path / "images" / split / f"class_{i % 2}" / f"{i:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), (i, split == "train" and i != 7, 0)).save(file)
    data = {"dataset": "image-folder", "path": str(tmp_path / "images"), "train_images": 10, "test_images": None}
    same = r"test/class_1/07\.png \(test\) and train/class_1/07\.png \(training\) are the same"
    with pytest.raises(UserError, match=rf"tiny\.yaml: data\.path: {same}"):
        planned(with_data(study("linear"), **data), tmp_path)


def test_a_plan_of_some_experiments_and_seeds(study, tmp_path) -> None:
    plan = planned(study("linear", "lora", "full", seeds=(3, 1, 4)), tmp_path)
    assert plan.only(("linear", "lora", "full"), (3, 1, 4), by_seed=False) == plan
    for by_seed, expected in (
        (True, "lora 4, linear 4, lora 3, linear 3"),
        (False, "lora 4, lora 3, linear 4, linear 3"),
    ):
        part = plan.only(("lora", "linear"), (4, 3, 9), by_seed=by_seed)
        assert ", ".join(f"{run.spec.experiment.name} {run.spec.seed}" for run in part.runs) == expected
        assert part.study == plan.study


def test_a_study_that_was_begun_otherwise_is_refused_before_anything_is_checked(study, tmp_path) -> None:
    plan = planned(study("full"), tmp_path)
    (tmp_path / "tiny").mkdir()
    begun = study_file(plan.study, ["full/seed_0"], smoke=False, data_sha256=plan.data_sha256)
    write_study_file(tmp_path / "tiny", begun)
    with pytest.raises(UserError, match=r"study\.json: configuration: was begun with another configuration") as caught:
        planned(study("full", epochs=3), tmp_path)
    assert "-experiments.full.training.epochs: 2\n+experiments.full.training.epochs: 3" in caught.value.details
    with pytest.raises(UserError, match="was begun with another configuration"):
        planned(study("lora"), tmp_path)
    added = planned(study("lora"), tmp_path, part=True)
    assert (added.part, len(added.runs)) == (True, 1)


def test_a_changed_configuration_under_the_same_name_is_refused_with_the_difference(study, tmp_path) -> None:
    config = study("lora")
    record = run_and_write(planned(config, tmp_path).runs[0].spec, tmp_path)
    file = run_folder(tmp_path, record.spec) / "record.json"
    before = file.read_bytes()
    with pytest.raises(UserError, match="another name, or choose another --output") as caught:
        planned(with_settings(config, 0, {"lora": {"rank": 3}}), tmp_path)
    assert caught.value.file == str(file)
    changes = "-experiment.lora.rank: 2\n+experiment.lora.rank: 3"
    assert caught.value.details == f"--- {file}\n+++ asked for\n{changes}"
    assert file.read_bytes() == before
    assert [run.done for run in planned(config.model_copy(update={"seeds": (0, 5)}), tmp_path).runs] == [True, False]
    write_record(tmp_path, record.model_copy(update={"status": "failed", "error": "the loss is nan"}))
    for again in (config, study("lora", learning_rate=1e-4)):
        assert len(planned(again, tmp_path).pending) == 1, "what has failed is done again, also otherwise"


ALL_RECOMPUTED = {"activation_checkpointing": "adaptive", "recomputed_blocks": 6}
FEW_PARAMETERS = {"total_rank_budget": None, "total_parameter_budget": 127}
LATE = {"quantization_schedule": "linear", "quantization_end_step": 7}  # of 6 steps
QA = {"adalora": {"total_rank_budget": 49}}  # six sites of 64 inputs and six of 192, in groups of 16: 4 and 12 ranks


@pytest.mark.part("configuration")
@pytest.mark.parametrize(
    ("method", "settings", "field"),
    [
        ("lora", {"lora": {"rank": 65}}, "lora.rank"),
        ("lora", {"lora": {"targets": ["qkv"]}}, "lora.targets"),
        ("lora", {"training": {"warmup_share": 0.1}}, "training.warmup_share"),
        ("lora", {"training": ALL_RECOMPUTED}, "training.recomputed_blocks"),
        ("full", {"training": {"epochs": 1, "batch_size": 24}}, "training.epochs"),
        ("adalora", {"adalora": {"targets": ["gate"]}}, "adalora.targets"),
        ("adalora", {"adalora": {"total_rank_budget": 35, "minimum_rank": 1}}, "adalora.total_rank_budget"),
        ("adalora", {"adalora": FEW_PARAMETERS}, "adalora.total_parameter_budget"),
        ("adalora", {"adalora": {"warmup_steps": 6}}, "adalora.warmup_steps"),
        ("adalora", {"adalora": {"allocation_strategy": "top_k", "top_k": 37}}, "adalora.top_k"),
        ("qa_lora", {"qa_lora": {"targets": ["out", "up"]}}, "qa_lora.targets"),
        ("qa_lora", {"qa_lora": {"group_size": 48}}, "qa_lora.group_size"),
        ("qa_lora", {"qa_lora": {"rank": 5}}, "qa_lora.rank"),
        ("qa_lora", {"qa_lora": LATE}, "qa_lora.quantization_end_step"),
        ("qa_adalora", {"adalora": {"total_rank_budget": 97}}, "adalora.total_rank_budget"),
        ("qa_adalora", {"adalora": {**QA["adalora"], "minimum_rank": 5}}, "adalora.minimum_rank"),
        ("qa_adalora", {"adalora": {**QA["adalora"], "maximum_rank": 13}}, "adalora.maximum_rank"),
        ("qa_adalora", {"adalora": {**QA["adalora"], "warmup_steps": 6}}, "adalora.warmup_steps"),
        ("qa_adalora", {**QA, "qa_lora": {"group_size": 48}}, "qa_lora.group_size"),
        ("qa_adalora", {**QA, "qa_lora": {"group_size": 32}}, "adalora.total_rank_budget"),
        ("qa_adalora", {**QA, "qa_lora": {"quantization_end_step": 7}}, "qa_lora.quantization_end_step"),
        ("peft_lora", {"peft_lora": {"targets": ["query", "fc1"]}}, "peft_lora.targets"),
        ("peft_adalora", {"peft_adalora": {"targets": ["value", "query"]}}, "peft_adalora.targets"),
    ],
)
def test_what_a_run_would_refuse_is_refused_by_the_plan(study, tmp_path, method, settings, field) -> None:
    if method.startswith("peft"):
        pytest.importorskip("peft")
    with pytest.raises(UserError) as caught:
        planned(with_settings(study("linear", method), 1, settings), tmp_path)
    assert (caught.value.file, caught.value.field) == (str(tmp_path / "tiny.yaml"), f"experiments[1].{field}")


@pytest.mark.part("configuration")
def test_a_recipe_has_to_fit_images_and_steps(study, tmp_path) -> None:
    with pytest.raises(UserError, match="saturation and hue have no effect on grey") as caught:
        planned(study("lora", augmentation=["flip", "color_jitter"]), tmp_path)
    assert caught.value.field == "experiments[0].training.augmentation[1].color_jitter"
    fitting = {
        "augmentation": [{"color_jitter": {"saturation": 0}}],
        "warmup_share": 0.4,
        "activation_checkpointing": "adaptive",
        "recomputed_blocks": 5,
    }
    assert len(planned(study("lora", **fitting), tmp_path).runs) == 1
    assert planned(study("full", epochs=1, batch_size=24, schedule="constant"), tmp_path).runs[0].total_steps == 1
    fits = planned(study("linear", batch_size=24), tmp_path).runs[0].total_steps
    assert fits == len(PROBE_L2)  # they need no course


def test_smoke_shrinks_schedules_and_keeps_methods_and_recipes(study) -> None:
    config = study("linear", "lora", "adalora", "qa_lora", seeds=(5, 6))
    small = smoke_study(config, patch_size=16)
    assert (small.seeds, small.threads, small.backbone.weights) == ((5,), 1, "random")
    assert [e.method for e in small.experiments] == [e.method for e in config.experiments]
    before, after = config.experiments[2].adalora, small.experiments[2].adalora
    schedule = {"warmup_steps", "update_frequency", "final_steps"}
    assert before.model_dump(exclude=schedule) == after.model_dump(exclude=schedule)
    assert small.experiments[3].qa_lora == config.experiments[3].qa_lora  # constant: nothing to shorten
    assert {-(-small.data.train_images // e.training.batch_size) for e in small.experiments} == {4}
    slow = study("full", augmentation=["rand_augment"], layer_decay=0.5, label_smoothing=0.1, warmup_share=0.5)
    training = smoke_study(slow, 8).experiments[0].training
    assert [change.name for change in training.augmentation] == ["rand_augment"]
    assert training.layer_decay == 0.5
    assert type(training).model_validate(training.model_dump()) == training


def test_a_result_counts_with_its_adapter_of_this_version_and_of_the_same_images(study, tmp_path) -> None:
    config = study("linear")
    record = run_and_write(planned(config, tmp_path).runs[0].spec, tmp_path)
    file = run_folder(tmp_path, record.spec) / "record.json"
    assert record.provenance is not None
    other_images = record.provenance.model_copy(update={"data_sha256": "0" * 64})
    for changed, words in (
        ({"spec_digest": "0" * 64}, "spec_digest: was made with a setting that this version does not have"),
        ({"provenance": other_images}, "other images under the same path"),
    ):
        write_record(tmp_path, record.model_copy(update=changed))
        with pytest.raises(UserError, match=words):
            planned(config, tmp_path)
    file.write_text(file.read_text()[:100])
    with pytest.raises(UserError, match=r"record\.json: is not a readable record .* move it away"):
        planned(config, tmp_path)
    write_record(tmp_path, record)
    (file.parent / "adapter.safetensors").unlink()
    assert len(planned(config, tmp_path).pending) == 1


def test_adaptive_ranks_on_quantized_sites_run_as_smoke_in_the_svd_form_too(study, tmp_path) -> None:
    config = with_settings(study("qa_adalora"), 0, {"adalora": {"parametrization": "svd"}})
    (run,) = planned(config, tmp_path, smoke=True).runs
    small = run.spec.experiment
    assert (small.adalora.warmup_steps, small.qa_lora.quantization_end_step) == (1, 5)
    record = run_and_write(run.spec, tmp_path)
    assert record.error is None
    assert record.rank_history[-1].spent == 40
    assert record.quantization.balance[-1]["quantized_share"] == 1.0


def test_a_plan_says_which_experiments_see_less_than_others(study, tmp_path) -> None:
    line = "augmentation: of its changes only flips reach linear, not rotate90, mixup"
    lora = study("lora", augmentation=["flip", "rotate90", "mixup"])
    both = lora.model_copy(update={"experiments": (*study("linear").experiments, *lora.experiments)})
    assert [line in planned(config, tmp_path).notices for config in (lora, both)] == [False, True]
