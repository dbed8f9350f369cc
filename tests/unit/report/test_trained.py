"""What training came to is said in plain words, and never more than the test images bear out."""

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import planted
import pytest

from peft_vit.base.statistics import Interval
from peft_vit.core.records import Metrics, Predictions, ProbeTest
from peft_vit.core.tasks import metric_of
from peft_vit.deploy.page import quality
from peft_vit.deploy.page.quality import result_lines, untested

LORA = planted.experiments()["lora_r8"]
N = 100


def lines_of(wrong: int, probe_wrong: range | None, chosen_step: int = 5) -> list[str]:
    """Return the lines on a model that has its first images wrong, and a probe that has those of a range wrong."""

    def metrics(errors: int) -> Metrics:
        right = 1 - errors / N
        return Metrics(n=N, accuracy=right, balanced_accuracy=right, auroc=None, nll=0.5, ece=0.1)

    labels = [i % 2 for i in range(N)]
    predicted = [label ^ (i < wrong) for i, label in enumerate(labels)]
    own = Predictions(images=list(range(N)), labels=labels, predicted=predicted, probability=[0.9] * N)
    changes = {"test": metrics(wrong), "predictions": own, "chosen_step": chosen_step}
    if probe_wrong is not None:
        said = [label ^ (i in probe_wrong) for i, label in enumerate(labels)]
        changes["probe_test"] = ProbeTest(metrics=metrics(len(probe_wrong)), predicted=said)
    return result_lines(planted.record(LORA, 0, 0.8, changes=changes), Path("my runs/0003-lora"), 95.4)


def test_the_answer_comes_first_and_commands_can_be_copied() -> None:
    assert lines_of(20, None) == [
        "Test accuracy 80.0 % (95 % interval 71.1 to 86.7), on 100 images that training has not seen.",
        "Time: 95 s.",
        "Model: my runs/0003-lora",
        "Page: peft-vit report 'my runs/0003-lora'",
        "To predict: peft-vit predict 'my runs/0003-lora' PHOTO.jpg",
    ]


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_classes_without_a_test_image_are_named(task) -> None:
    names, labels = ["sound", "crack", "dirt"], [0, 2]
    if task == "multilabel":
        labels = [[1, 0, 0], [1, 0, 1]]
    of_run = SimpleNamespace(class_names=names, task=task, predictions=SimpleNamespace(labels=labels))
    (line,) = untested(of_run)
    assert [name in line for name in names] == [False, True, False]
    of_run.class_names = names[:1]
    assert untested(of_run) == []
    of_run.predictions = None
    assert untested(of_run) == []


def test_of_a_handful_of_test_images_nothing_is_claimed() -> None:
    own = Predictions(images=[0, 1], labels=[0, 0], predicted=[0, 0], probability=[0.9] * 2)
    line, *_ = result_lines(planted.record(LORA, 0, 0.8, changes={"predictions": own}), Path("run"), 95.4)
    validation = planted.record(LORA, 0, 0.8).validation
    share = f"{100 * validation.accuracy:.1f}"
    assert line == (
        f"Validation accuracy {share} %, on {validation.n} images that training chose by; only 2 tested it."
    )


@pytest.mark.parametrize(
    ("wrong", "probe_wrong", "chosen_step", "said"),
    [
        (10, range(30), 5, "20.0 points better here; on other test images +11.4 to +27.8."),
        (30, range(10), 5, "20.0 points worse here; on other test images −27.8 to −11.4."),
        (
            10,
            range(5, 17),
            5,
            "2.0 points better here; on other test images −5.2 to +9.1: too few to tell which is better.",
        ),
        (10, range(10), 0, "Training did not improve on it on validation images, so you get the linear probe."),
    ],
)
def test_training_is_held_against_the_probe_on_the_same_images(wrong, probe_wrong, chosen_step, said) -> None:
    _, probe, gain, *_ = lines_of(wrong, probe_wrong, chosen_step)
    share = 100 - len(probe_wrong)
    assert probe.startswith(f"A linear probe has {share}.0 % (95 % interval ")
    assert gain.removeprefix("You get the trained model, which is ") == said


def test_what_resamples_of_test_images_can_not_tell_is_not_claimed(monkeypatch) -> None:
    agree = Interval(0.0, None, None, N, 0.95, reason="all resamples agree")
    metric = replace(metric_of(planted.record(LORA, 0, 0.8).spec), gain=lambda *_: agree)
    monkeypatch.setattr(quality, "metric_of", lambda _: metric)
    _, _, gain, *_ = lines_of(10, range(10))
    assert gain == "100 test images can't tell what training gained on it: all resamples agree."
