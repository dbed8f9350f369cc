"""A training that is built again from its state, at any step, equals one that was not interrupted, bit for bit."""

import weakref

import pytest
import torch
from prepared_methods import METHODS, STEPS

from peft_vit.base.errors import UserError
from peft_vit.core.adapters import current_ranks, trained_tensors, use_int8_matmul
from peft_vit.core.config import TrainingConfig
from peft_vit.core.records import Metrics
from peft_vit.core.training import train
from peft_vit.core.training.checkpoint import (
    generators_state,
    load_generators_state,
    load_model_state,
    model_state,
    read_checkpoint,
    tensors_sha256,
    write_checkpoint,
)

pytestmark = pytest.mark.part("runner")
EPOCHS = 4  # of 18 images in batches of 8: 12 steps


class Stopped(Exception):  # noqa: N818 - nothing went wrong
    pass


def config(**settings) -> TrainingConfig:
    settings["augmentation"] = tuple(settings.get("augmentation", ["flip"]))
    return TrainingConfig(**{"epochs": EPOCHS, "batch_size": 8, "learning_rate": 3e-3, **settings})


TRAININGS = {
    "sgd": {"optimizer": "sgd", "learning_rate": 0.05},
    "constant": {"schedule": "constant", "clip_norm": None},
}
IMAGES, MIXES = ("rotate90", "random_resized_crop", "color_jitter", "rand_augment"), ("mixup", "cutmix")
CASES = [
    *((method, {}) for method in METHODS),
    ("lora", TRAININGS["sgd"]),
    ("growing", TRAININGS["sgd"]),
    ("lora", TRAININGS["constant"] | {"class_weights": "balanced"}),
    ("growing", TRAININGS["constant"]),
    *(("lora", {"augmentation": [change, "flip"]}) for change in IMAGES),
    *(("lora", {"augmentation": [change]}) for change in MIXES),
    ("lora", {"augmentation": ["flip", *IMAGES, *MIXES], "class_weights": "balanced", "label_smoothing": 0.1}),
    ("full", {"layer_decay": 0.5, "warmup_share": 0.2}),
    *((method, {"micro_batch_size": 4}) for method in ("growing", "qa_lora", "peft_adalora")),
    *((method, {"activation_checkpointing": "blocks"}) for method in ("growing", "qa_adalora")),
    *((method, {"compute": "int8"}) for method in ("lora", "growing", "qa_lora", "qa_adalora")),
    ("growing", {"compute": "int8", "activation_checkpointing": "blocks", "micro_batch_size": 4}),
    ("lora", {"activation_checkpointing": "light"}),
    ("qa_adalora", {"activation_checkpointing": "adaptive", "recomputed_blocks": 1, "micro_batch_size": 4}),
]


class Run:
    """A training that may be stopped after some steps; everything is then built again from a file."""

    def __init__(self, tiny_vit, data, runtime, folder, method, training) -> None:
        self.made = tiny_vit, data, runtime
        self.folder, self.method, self.training = folder, method, config(**training)
        self.probe = None  # or how good the model is before the first step

    def once(self, resume=None, stop_at=None):
        """Return the result and what it leaves, or None if it was stopped and a checkpoint was written."""
        tiny_vit, data, runtime = self.made
        model = tiny_vit()
        hooks = METHODS[self.method](model)
        if self.training.compute == "int8":
            use_int8_matmul(model)

        def pause(step, state) -> None:
            if step == stop_at:
                write_checkpoint(self.folder, step, state())
                raise Stopped

        try:
            named = {"hooks": hooks, "between_steps": pause, "resume": resume, "probe": self.probe}
            result = train(model, data(), self.training, runtime, seed=4, **named)
        except Stopped:
            return None
        return left(model, hooks, result)

    def interrupted(self, *steps):
        resume = None
        for step in steps:
            assert self.once(resume, step) is None
            resume = read_checkpoint(self.folder / f"checkpoint-{step}")
            unsettle()
        return self.once(resume)


def unsettle() -> None:
    """Leave torch's generator elsewhere, as another process would."""
    torch.manual_seed(99)


def left(model, hooks, result) -> dict:
    """Return all that a training leaves, apart from seconds."""
    steps = [row.model_dump(exclude={"seconds"}) for row in result.steps]
    tensors = {name: tensor.clone() for name, tensor in trained_tensors(model).items()}
    return {
        "steps": steps,
        "evaluations": result.evaluations,
        "chosen": result.chosen,
        "ranks": current_ranks(model),
        "counts": (result.initial_parameters, result.peak_parameters, result.optimizer_bytes),
        "optimizer": result.optimizer_sha256,
        "model": tensors_sha256(tensors),
        "strides": {name: tensor.stride() for name, tensor in tensors.items()},
        "hooks": [printed(hook.state_dict()) for hook in hooks],
    }


def printed(state) -> str:
    """Return a state as text, each tensor as its hash."""
    if isinstance(state, torch.Tensor):
        return tensors_sha256({"": state})
    if isinstance(state, dict):
        return str({key: printed(part) for key, part in state.items()})
    return repr(state)


@pytest.fixture
def make(tiny_vit, data, runtime, tmp_path):
    return lambda method, **training: Run(tiny_vit, data, runtime, tmp_path, method, training)


@pytest.mark.parametrize(("method", "training"), CASES)
def test_interrupted_it_equals_one_that_was_not(make, method, training) -> None:
    """Each method after every step; each setting at the beginning, in the middle and at the end of an epoch."""
    if method.startswith("peft"):
        pytest.importorskip("peft")
    run = make(method, **training)
    whole = run.once()
    assert [row["step"] for row in whole["steps"]] == list(range(1, STEPS + 1))
    again = run.interrupted(*(range(1, STEPS + 1) if not training else (4, 8, 11)))
    for key, value in whole.items():
        assert again[key] == value, key
    if method == "growing":
        assert "probe_history" in whole["hooks"][0]


@pytest.mark.parametrize(
    ("method", "training"),
    [("lora", {"compute": "int8"}), ("growing", {"activation_checkpointing": "blocks"}), ("qa_adalora", {})],
)
def test_on_two_threads_that_take_half_of_a_batch_each_too(make, method, training) -> None:
    alone = make(method, **training).once()
    torch.set_num_threads(2)
    try:
        run = make(method, **training)
        whole, again = run.once(), run.interrupted(4, 8, 11)
    finally:
        torch.set_num_threads(1)
    assert again == whole
    losses, of_one = ([row["loss"] for row in left["steps"]] for left in (whole, alone))
    assert losses != of_one  # gradients were added up otherwise
    assert losses == pytest.approx(of_one, rel=0.02)


EARLY_END = {"validate_every": 1, "patience": 1, "learning_rate": 1.0, "clip_norm": None, "optimizer": "sgd"}


@pytest.mark.parametrize("method", ["linear", "lora"])
@pytest.mark.parametrize("schedule", ["warmup_stable_decay", "constant"])
def test_an_end_that_patience_brought_nearer_is_kept(make, method, schedule) -> None:
    """Interrupted before and after the way down has begun: after each step."""
    run = make(method, epochs=None, steps=60, schedule=schedule, **EARLY_END)
    whole = run.once()
    done = len(whole["steps"])
    assert 2 <= done < 60
    rates = [row["learning_rate"] for row in whole["steps"]]
    assert (rates[-1] < 1.0) == (schedule == "warmup_stable_decay")
    assert run.interrupted(*range(1, done + 1)) == whole
    assert run.interrupted(done - 1) == whole


def test_the_validation_before_the_first_step_is_kept(make) -> None:
    run = make("adalora", learning_rate=1.0, clip_norm=None, schedule="constant")
    run.probe = Metrics(n=12, accuracy=0.5, balanced_accuracy=0.5, auroc=None, nll=1.0, ece=0.1)
    whole = run.once()
    assert [evaluation.step for evaluation in whole["evaluations"]] == [0, 3, 6, 9, 12]
    assert run.interrupted(1, 4, STEPS) == whole


def test_what_was_gone_on_from_is_not_kept_in_memory(make) -> None:
    """Or twice the weights would be held, once other ranks or better weights have taken their place."""
    run = make("full")
    run.once(None, 5)
    tiny_vit, data, runtime = run.made
    held: list[weakref.ref] = []
    there: list[bool] = []

    def read():
        state = read_checkpoint(run.folder / "checkpoint-5")
        held.append(weakref.ref(state))
        return state

    def look(step, state) -> None:
        there.append(held[0]() is not None)

    train(tiny_vit(), data(), run.training, runtime, seed=4, resume=read(), between_steps=look)
    assert there
    assert not any(there)


@pytest.mark.parametrize("other", ["lora", "full"])
def test_a_state_of_another_training_is_refused(make, other) -> None:
    make("growing").once(None, 5)
    run = make(other)
    with pytest.raises((UserError, ValueError), match=r"other modules|another configuration|zip"):
        run.once(read_checkpoint(run.folder / "checkpoint-5"))


@pytest.mark.parametrize("value", [torch.zeros(3), torch.zeros(2, 2)])
def test_moments_of_other_shapes_are_refused(make, value) -> None:
    run = make("growing")
    run.once(None, 5)
    state = read_checkpoint(run.folder / "checkpoint-5")
    moments = state["optimizer"]["state"]
    moments[max(moments)]["exp_avg"] = value
    with pytest.raises(ValueError, match=r"exp_avg of parameter .* has the shape"):
        run.once(state)


def test_the_best_weights_so_far_come_back(make) -> None:
    """Of a training whose best epoch is not its last one, interrupted later, the best one's weights are taken."""
    run = make("lora", learning_rate=1.0, schedule="constant", clip_norm=None)
    whole = run.once()
    assert whole["chosen"].step < STEPS
    assert run.interrupted(STEPS) == whole
    assert run.interrupted(whole["chosen"].step, STEPS - 1) == whole


def test_buffers_that_training_moves_are_kept(tiny_vit) -> None:
    model, other = tiny_vit(), tiny_vit()
    for changed in (model, other):
        changed.add_module("normed", torch.nn.BatchNorm1d(3))
    model.normed(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))
    state = model_state(model)
    load_model_state(other, {**state, "tensors": {name: tensor.clone() for name, tensor in state["tensors"].items()}})
    assert torch.equal(other.normed.running_mean, model.normed.running_mean)
    assert int(other.normed.num_batches_tracked) == 1


def test_the_global_generator_goes_on_where_it_was(tmp_path) -> None:
    with torch.random.fork_rng():
        torch.rand(3)
        write_checkpoint(tmp_path, 1, generators_state())
        first = torch.randn(4)
        unsettle()
        load_generators_state(read_checkpoint(tmp_path / "checkpoint-1"))
        assert torch.equal(torch.randn(4), first)
