"""What a run says of its memory does not depend on what its worker did before."""

import sys

import pytest
import torch
from at_work import at_work, events_of, of
from small_methods import study_mapping
from written_runs import planned

from peft_vit.core.config import study_from_mapping
from peft_vit.runs.execute import run_one
from peft_vit.runs.executors import RunEnded
from peft_vit.runs.executors.local import LocalExecutor
from peft_vit.runs.scheduling.plan import plan_study

pytestmark = pytest.mark.part("runner")

# Of what kernels and libraries set up once in a process, the first run of a worker pays some 10 MB. The PEFT library
# with transformers leaves 80 MB.
TOLERANCE_BYTES = 24e6
LEFT_BYTES = 50e6
TRAINING = {"epochs": 1, "batch_size": 16, "learning_rate": 1e-3, "schedule": "constant"}
SECTIONS = {"lora": {"lora": {"rank": 2}}, "full": {}, "peft_lora": {"peft_lora": {"rank": 2}}}
STUDY = study_mapping(
    [{"name": name, "method": name, "training": TRAINING, **section} for name, section in SECTIONS.items()],
    name="memory",
    backbone={"model": "vit_tiny_patch16_224", "weights": "random"},
    data={"dataset": "digits", "image_size": 64, "train_images": 64, "validation_images": 64, "test_images": 64},
)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell what memory is made of")
def test_a_run_takes_as_much_first_in_its_worker_as_after_others(cache, tmp_path) -> None:
    file = tmp_path / "memory.yaml"
    plan = plan_study(study_from_mapping(STUDY, file=file), tmp_path, file=file)
    runs = {run.spec.experiment.name: run for run in plan.runs}
    order = (runs[name] for name in ("lora", "full", "peft_lora", "lora"))
    with at_work(LocalExecutor(1, tmp_path, 30), *order) as executor:
        events = events_of(executor, lambda events: len(of(events, RunEnded)) == 4)
    first, full, _, last = (event.record for event in of(events, RunEnded))
    assert {event.record.error for event in of(events, RunEnded)} == {None}
    assert last.peak_memory_bytes - first.peak_memory_bytes > LEFT_BYTES, "the worker kept what others left"
    assert abs(last.own_memory_bytes - first.own_memory_bytes) < TOLERANCE_BYTES
    assert full.own_memory_bytes > first.own_memory_bytes + full.bytes.optimizer_bytes / 4, "methods can be told apart"


def test_no_evaluation_has_a_larger_batch_than_training(study, tmp_path, monkeypatch) -> None:
    """Or a method that keeps few activations would take most memory there."""
    (run,) = planned(study("lora"), tmp_path).runs
    seen = []
    whole = torch.nn.Conv2d.forward  # of the patches: it sees every batch
    monkeypatch.setattr(torch.nn.Conv2d, "forward", lambda self, x: (seen.append(len(x)), whole(self, x))[1])
    assert run_one(run.spec).record.error is None
    assert max(seen) == run.spec.experiment.training.batch_size
    # One image to count tokens, one to see that adapters act; validation once more, to calibrate what was chosen.
    assert sum(seen) == 2 + 2 * (24 + 20) + 20 + 30
