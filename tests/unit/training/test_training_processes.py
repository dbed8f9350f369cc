"""Two processes on 16 images each reach what one reaches on 32, by every method, to rounding."""

import os
import time

import numpy as np
import prepared_methods
import pytest
import torch
from trained_together import PATIENCE_S, STEPS, first_codes, resumed, together, trained, trained_each

from peft_vit.core.training import LostProcessError, processes

pytestmark = pytest.mark.part("trainer")
USUAL = {
    "lora": ("lora", {}, {}),
    "adalora": ("adalora", {}, {}),
    "growing": ("growing", {}, {}),
    "qa_lora": ("qa_lora", {"micro_batch_size": 8}, {}),
    "checkpointing": ("qa_adalora", {"activation_checkpointing": "blocks"}, {}),
    "one image in the last batch": ("lora", {"clip_norm": 0.01}, {"images": 65}),
    "mixed": ("lora", {"augmentation": ["flip", "mixup", "cutmix"]}, {"images": 65}),
    "patience": ("lora", {"patience": 2, "validate_every": 1, "schedule": "warmup_stable_decay"}, {}),
    "int8": ("growing", {"compute": "int8", "micro_batch_size": 8}, {"double": False}),
    "float32": ("lora", {"class_weights": "balanced", "label_smoothing": 0.1}, {"double": False}),
}
OTHERS = {
    **{method: (method, {}, {}) for method in prepared_methods.METHODS if method not in USUAL},
    **{f"{method} in int8": (method, {"compute": "int8"}, {"double": False}) for method in ("lora", "qa_lora")},
    "adalora in float32": ("adalora", {}, {"double": False}),
    "light": ("lora", {"activation_checkpointing": "light"}, {"double": False}),
    "crops": ("lora", {"augmentation": ["random_resized_crop", "color_jitter", "rotate90", "cutmix"]}, {}),
    "sgd": ("growing", {"optimizer": "sgd", "learning_rate": 0.02}, {}),
}


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """Return what one process and two leave, by case; trained at the first question, those that are slow apart."""
    known = {}

    def ask(case):
        if case not in known:
            cases = USUAL if case in USUAL else OTHERS
            pair = together(trained_each, 2, tmp_path_factory.mktemp("together"), cases)
            known.update(
                {name: (trained_each({name: cases[name]})[name], *(one[name] for one in pair)) for name in cases}
            )
        return known[case]

    return ask


def distance(ours, theirs) -> float:
    """Return the relative distance of two sets of tensors."""
    difference = sum(float((ours[name] - theirs[name]).double().square().sum()) for name in theirs)
    return (difference / sum(float(tensor.double().square().sum()) for tensor in theirs.values())) ** 0.5


def largest_difference(ours, theirs) -> float:
    """Return it, of the elements of two sets of tensors; those of sites without rank have none."""
    return float(torch.cat([(ours[name] - theirs[name]).flatten() for name in theirs]).abs().max())


@pytest.mark.parametrize("case", [*USUAL, *(pytest.param(case, marks=pytest.mark.slow) for case in OTHERS)])
def test_two_processes_do_what_one_does(both, case) -> None:
    (alone, first, second), settings = both(case), (USUAL | OTHERS)[case]
    for name in ("sha256", "optimizer_sha256", "ranks", "bits", "steps", "evaluations", "chosen_step"):
        assert first[name] == second[name], name  # of both processes, to the bit
    assert first["ranks"] == alone["ranks"]
    assert [row["step"] for row in first["steps"]] == [row["step"] for row in alone["steps"]]
    assert [entry["ranks"] for one in first["history"] for entry in one] == [
        entry["ranks"] for one in alone["history"] for entry in one
    ]
    assert first["bits"] == alone["bits"]
    in_int8, in_double = settings[1].get("compute") == "int8", settings[2].get("double", True)
    # A tie that rounds to the other of two codes changes a value by a part in 127, wherever it is.
    assert distance(first["gradients"], alone["gradients"]) < (1e-3 if in_int8 else 1e-5)
    assert largest_difference(first["tensors"], alone["tensors"]) < (1e-8 if in_double else 5e-3)
    losses = [[row["loss"] for row in one["steps"]] for one in (first, alone)]
    assert losses[0] == pytest.approx(losses[1], rel=1e-9 if in_double else 2e-2 if in_int8 else 1e-3)


def test_a_run_that_ends_early_ends_at_the_same_step(both) -> None:
    alone, first, _ = both("patience")
    assert len(first["steps"]) == len(alone["steps"]) < STEPS


def test_codes_of_integer_products_differ_by_ties_alone(tmp_path) -> None:
    alone, pair = first_codes(), together(first_codes, 2, tmp_path)
    both = [torch.cat(rows) for rows in zip(*pair, strict=True)]  # rows of images lie as in the batch
    assert len(both) == len(alone) == 8  # products in two blocks
    differing = [int((ours != theirs).sum()) for ours, theirs in zip(both, alone, strict=True)]
    largest = max(int((ours.int() - theirs.int()).abs().max()) for ours, theirs in zip(both, alone, strict=True))
    assert largest <= 1  # a tie goes to a neighbour
    assert sum(differing) <= 1e-3 * sum(codes.numel() for codes in alone)


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_a_checkpoint_of_two_goes_on_in_one_and_back(tmp_path, both, before, after) -> None:
    alone, *_ = both("growing")
    folder = tmp_path / "run"
    for count, stop_at in ((before, 7), (after, None)):
        if count == 1:
            left = resumed(folder, stop_at)
        else:
            (work := tmp_path / str(stop_at)).mkdir()
            left, *_ = together(resumed, count, work, folder, stop_at)
    assert left["ranks"] == alone["ranks"]
    assert largest_difference(left["tensors"], alone["tensors"]) < 1e-8


@pytest.mark.parametrize("ends", [True, False])
def test_a_process_that_is_gone_or_hangs_is_named_by_the_others(tmp_path, ends) -> None:
    limit_s = PATIENCE_S if ends else 20
    (told,) = together(_left_alone, 2, tmp_path, ends, survivors=1, limit_s=limit_s)
    assert told.startswith("another process")
    assert len(told.splitlines()) == 1


def _left_alone(ends: bool) -> str:
    def between(step, _) -> None:
        if step == 3 and processes.rank() == 1:
            os._exit(9) if ends else time.sleep(PATIENCE_S)

    try:
        trained("lora", {}, between_steps=between)
    except LostProcessError as error:
        return str(error)
    return "trained"


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("number", [1, 2, 5, 32, 33])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_each_row_is_of_one_process(monkeypatch, number, count, mirrored) -> None:
    monkeypatch.setattr(processes, "count", lambda: count)
    rows = []
    for rank in range(count):
        monkeypatch.setattr(processes, "rank", lambda rank=rank: rank)
        own = processes.own_rows(number, mirrored=mirrored)
        rows.append(own)
        if mirrored:  # reversed within a process as within the batch
            assert (number - 1 - own[::-1] == own).all()
    assert sorted(np.concatenate(rows)) == list(range(number))
    assert max(map(len, rows)) - min(map(len, rows)) <= (3 if mirrored else 1)


def test_what_fails_in_one_process_fails_in_all(tmp_path) -> None:
    told = together(_fails_in_the_second, 2, tmp_path)
    assert told == ["UserError", "OSError"]


def _fails_in_the_second() -> str:
    def work() -> None:
        if processes.rank() == 1:
            raise OSError("no such folder")

    try:
        processes.in_each(work)
    except Exception as error:
        return type(error).__name__
    return ""
