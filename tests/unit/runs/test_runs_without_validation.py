"""Without validation images the last step's model is taken, the record says so, and what needs them is refused."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from done_runs import do, do_one, restored, with_data
from torch.nn.functional import cross_entropy
from written_runs import planned

from peft_vit.base.errors import UserError
from peft_vit.core.tasks.classification import ACCURACY
from peft_vit.core.training import Features, held_out_fit
from peft_vit.deploy.export import export_run_to_file
from peft_vit.lab.analysis.recommendation import recommend
from peft_vit.lab.analysis.studies import load_studies
from peft_vit.lab.report import build_report
from peft_vit.runs import execute as run_module
from peft_vit.runs import head_init
from peft_vit.runs.execute import run_one
from peft_vit.runs.records.storage import run_folder

pytestmark = pytest.mark.part("runner")


@pytest.fixture
def unseen(study):
    """Make a study that validates nothing."""

    def make(*methods, seeds=(0,), **training):
        return with_data(study(*methods, seeds=seeds, **training), validation_images=0)

    return make


def test_the_last_step_is_the_model_and_is_tested_once(unseen, tmp_path, monkeypatch) -> None:
    """That a training which nobody watches takes the same steps: test_training_loop.py."""
    predict, tested = run_module.predict, []
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "predict", lambda *args, **named: tested.append(1) or predict(*args, **named))
        record = do_one(unseen("lora"), tmp_path)
    assert (record.validation, record.evaluations, record.chosen_step) == (None, [], 6)
    assert record.split_sizes == {"train": 24, "validation": 0, "test": 30}
    assert set(record.majority_accuracy) == {"test"}
    assert (record.test.n, tested) == (30, [1])
    restored(record, tmp_path)


def test_probes_are_fitted_at_the_strength_that_was_given(study, unseen, tmp_path) -> None:
    (record,) = do(unseen("linear", probe_l2=0.03), tmp_path)
    fit = record.head_fit
    assert (fit.l2, fit.chosen_l2, fit.validation, fit.chosen) == ((0.03,), 0.03, (), None)
    assert (record.validation, record.evaluations, record.chosen_step) == (None, [], 1)
    assert [row.step for row in record.steps] == [1]
    file = tmp_path / "model.safetensors"
    done = export_run_to_file(run_folder(tmp_path, record.spec), file, "safetensors")
    assert (done.comparison.split, done.comparison.same_predictions) == ("training", 1.0)
    packed = export_run_to_file(run_folder(tmp_path, record.spec), file, "safetensors", bits="int8", overwrite=True)
    assert packed.comparison.split == "training"
    assert file.stat().st_size < 0.5 * packed.source.float_bytes
    (watched,) = do(study("linear", probe_l2=0.03), tmp_path / "watched")
    assert watched.head_fit.l2 == (0.03,)
    assert watched.validation == watched.head_fit.chosen


def test_training_starts_from_the_probe_at_a_temperature_of_images_left_out(unseen, tmp_path) -> None:
    (record,) = do(unseen("lora", head_start="probe", probe_l2=0.03, schedule="constant"), tmp_path)
    assert record.head_fit.validation == ()
    assert record.chosen_step == 6
    # 24 images in 64 dimensions are separated: without the temperature the first loss would be next to nothing.
    assert record.steps[0].loss > 0.5


def test_images_left_out_choose_the_penalty(unseen, tmp_path) -> None:
    probe, lora = do(unseen("linear", "lora", head_start="probe"), tmp_path)
    assert probe.head_fit.chosen_l2 == lora.head_fit.chosen_l2
    assert probe.head_fit.l2 == (probe.head_fit.chosen_l2,)
    assert (probe.head_fit.validation, probe.evaluations, probe.chosen_step) == ((), [], 1)


@pytest.mark.parametrize("different", [23, 1])
def test_copies_are_left_out_together(unseen, tmp_path, monkeypatch, different) -> None:
    """Unless a class would have no image to learn from."""
    spec, loaded, seen = planned(unseen("lora", head_start="probe"), tmp_path).runs[0].spec, run_module.load_data, []

    def with_copies(*arguments, **named):
        data = loaded(*arguments, **named)
        groups = np.arange(len(data.groups))
        groups[data.train.positions] = groups[data.train.positions[0]] + np.arange(24) % different
        return replace(data, groups=groups)

    def listening(train, groups, *rest, **named):
        seen.append(len(np.unique(groups)))
        return held_out_fit(train, groups, *rest, **named)

    monkeypatch.setattr(run_module, "load_data", with_copies)
    monkeypatch.setattr(head_init, "held_out_fit", listening)
    assert run_one(spec).record.error is None
    assert seen == [23 if different == 23 else 24]


def test_a_class_of_one_image_is_learned_and_left_out_of_no_fit(unseen, tmp_path, monkeypatch) -> None:
    """As a fold of few labels leaves one, if a class has two."""
    spec, loaded, seen = planned(unseen("lora", head_start="probe"), tmp_path).runs[0].spec, run_module.load_data, []

    def with_one_alone(*arguments, **named):
        data = loaded(*arguments, **named)
        data.train.labels = data.train.labels.copy()
        data.train.labels[np.flatnonzero(data.train.labels == 0)[1:]] = 1
        return data

    def listening(train, groups, *rest, **named):
        seen.append((train.labels, held_out_fit(train, groups, *rest, **named)[1]))
        return named["l2"][0], seen[0][1]

    monkeypatch.setattr(run_module, "load_data", with_one_alone)
    monkeypatch.setattr(head_init, "held_out_fit", listening)
    assert run_one(spec).record.error is None
    ((labels, logits),) = seen
    assert np.isnan(logits).all(1).tolist() == (labels[: len(logits)] == 0).tolist()
    assert np.isfinite(logits[labels[: len(logits)] != 0]).all()


def test_the_temperature_is_that_of_heads_on_images_left_out() -> None:
    """Against scikit-learn's own folds and a grid of temperatures; it divides what is too sure, and leaves the rest."""
    from sklearn.linear_model import LogisticRegression

    rng = np.random.default_rng(0)
    labels = np.arange(200) % 2
    values = (rng.normal(size=(200, 40)) + 0.3 * labels[:, None] * (np.arange(40) < 3)).astype(np.float32)
    flipped = values + rng.normal(0, 0.1, values.shape).astype(np.float32)
    train = Features(np.concatenate([values, flipped]), np.tile(labels, 2))

    def temperature_at(l2: float) -> float:
        chosen, left_out = held_out_fit(train, np.arange(200), ACCURACY, l2=[l2], seed=3)
        assert chosen == l2
        return train.task.temperature(torch.from_numpy(left_out), torch.from_numpy(labels))

    temperature = temperature_at(0.001)
    logits = np.empty((200, 2))
    for fold in range(5):
        out = (np.arange(200) // 2) % 5 == fold
        both = np.tile(~out, 2)
        mean, std = train.values[both].mean(0), train.values[both].std(0)
        model = LogisticRegression(C=2 / (0.001 * both.sum()), max_iter=5000, tol=1e-8)
        model.fit((train.values[both] - mean) / std, train.labels[both])
        margin = model.decision_function((values[out] - mean) / std)
        logits[out] = np.stack([-margin / 2, margin / 2], 1)
    grid = np.exp(np.linspace(-2, 4, 300))
    losses = [float(cross_entropy(torch.from_numpy(logits / t), torch.from_numpy(labels))) for t in grid]
    assert temperature == pytest.approx(grid[int(np.argmin(losses))], rel=0.35)  # other folds, and as many images
    assert temperature > 1.5
    assert temperature_at(1.0) < temperature
    alone = Features(values[:5], np.array([0, 0, 0, 0, 1]))
    with pytest.raises(UserError, match="needs two training images each of two classes"):
        held_out_fit(alone, np.arange(5), ACCURACY, l2=[0.1])


def test_the_report_goes_without_and_a_recommendation_is_refused(unseen, tmp_path) -> None:
    do(unseen("linear", "lora", seeds=(0,), probe_l2=0.1, head_start="probe", epochs=1, schedule="constant"), tmp_path)
    (study,) = load_studies(tmp_path)
    assert len(study.runs) == 2
    assert not study.failed
    with pytest.raises(UserError, match=r"tiny: has runs without validation images.* data\.validation_images"):
        recommend(study, {}, margin=0.01)
    build_report(tmp_path, tmp_path / "report")
    page = (tmp_path / "report" / "report.html").read_text()
    assert "chosen on validation" not in page
    assert "Pareto fronts" not in page
