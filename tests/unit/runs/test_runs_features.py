"""Features are computed once for all runs of the same frozen backbone, and of no other."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file
from written_runs import planned

from peft_vit.core.config import AUGMENTATION_OF_FLIPS, QaLoraConfig
from peft_vit.core.training import QALoRATrainer, RuntimeConfig, head_inputs
from peft_vit.core.training.images import LabelledImages
from peft_vit.runs.head_init import SharedFeatures

pytestmark = pytest.mark.part("runner")
PROVENANCE = {
    "random_weights": False,
    "weights_sha256": "a" * 64,
    "config_sha256": None,
    "data_sha256": "d" * 64,
    "device": "cpu",
    "integer_bits": None,
    "packages": {"timm": "1"},
    "processor": "p",
}
RUNTIME = RuntimeConfig(torch.device("cpu"), "fp32", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@pytest.fixture
def images() -> LabelledImages:
    rng = np.random.default_rng(0)
    return LabelledImages(
        rng.integers(0, 256, (10, 32, 32, 3), dtype=np.uint8), np.arange(10) % 5, np.arange(100, 0, -10)
    )


@pytest.fixture
def spec(study, tmp_path, monkeypatch):
    (run,) = planned(study("lora"), tmp_path).runs
    monkeypatch.setenv("PEFT_VIT_CACHE", str(tmp_path / "cache"))  # of this test alone
    return run.spec


def with_flips(spec, flips):
    training = spec.experiment.training.model_copy(update={"augmentation": AUGMENTATION_OF_FLIPS[flips]})
    return spec.model_copy(update={"experiment": spec.experiment.model_copy(update={"training": training})})


class Counted:
    """A model that counts its forward passes, and the features of it that runs would share."""

    def __init__(self, tiny_vit) -> None:
        self.model = tiny_vit().eval()
        self.passes = 0
        self.model.register_forward_hook(self._count)

    def _count(self, *arguments) -> None:
        self.passes += 1

    def features(self, spec, hooks=(), runtime=RUNTIME, **provenance) -> SharedFeatures:
        fields = SimpleNamespace(**{**PROVENANCE, **provenance})
        return SharedFeatures(self.model, spec, fields, list(hooks), runtime)


@pytest.fixture
def counted(tiny_vit) -> Counted:
    return Counted(tiny_vit)


def files(tmp_path):
    return sorted((tmp_path / "cache" / "features").glob("*"))


def test_the_second_run_computes_nothing(counted, spec, images, tmp_path) -> None:
    first = counted.features(spec).of(images)
    assert counted.passes == 1
    np.testing.assert_array_equal(first.values, head_inputs(counted.model, images, RUNTIME, 32))
    counted.passes = 0
    other_seed = spec.model_copy(update={"seed": 9})
    again = counted.features(other_seed).of(images)
    assert counted.passes == 0
    np.testing.assert_array_equal(again.values, first.values)
    assert len(files(tmp_path)) == 1
    # of images that are known in part, in another order, only the others are computed
    rng = np.random.default_rng(1)
    pixels = np.concatenate([images.pixels[[7, 2]], rng.integers(0, 256, (1, 32, 32, 3), dtype=np.uint8)])
    mixed = LabelledImages(pixels, np.array([2, 2, 0]), np.array([30, 80, 5]))
    features = counted.features(spec).of(mixed)
    assert counted.passes == 1
    np.testing.assert_array_equal(features.values[:2], first.values[[7, 2]])
    np.testing.assert_allclose(features.values, head_inputs(counted.model, mixed, RUNTIME, 32), rtol=0, atol=1e-6)
    np.testing.assert_array_equal(features.labels, mixed.labels)
    assert sorted(load_file(files(tmp_path)[0])["places"]) == sorted([*(4 * images.positions), 20])


def test_how_far_features_are_is_told_batch_by_batch_of_those_that_are_computed(counted, spec) -> None:
    rng, told = np.random.default_rng(0), []
    pixels = rng.integers(0, 256, (70, 32, 32, 3), dtype=np.uint8)
    many = LabelledImages(pixels, np.arange(70) % 3, np.arange(70))
    shared = SharedFeatures(
        counted.model, spec, SimpleNamespace(**PROVENANCE), [], RUNTIME, on_progress=lambda *counts: told.append(counts)
    )
    shared.of(many)
    assert told == [(32, 70), (64, 70), (70, 70)]
    shared.of(many)  # which are known now
    assert len(told) == 3


@pytest.mark.parametrize(
    ("flips", "ways"), [("none", [()]), ("horizontal", [(), (-1,)]), ("both", [(), (-1,), (-2,), (-2, -1)])]
)
def test_training_images_come_in_every_way_in_which_they_are_shown(counted, spec, images, flips, ways) -> None:
    shared = counted.features(with_flips(spec, flips))
    features = shared.of_training(images)
    expected = [head_inputs(counted.model, images, RUNTIME, 32, axes) for axes in ways]
    np.testing.assert_array_equal(features.values, np.concatenate(expected))
    np.testing.assert_array_equal(features.labels, np.tile(images.labels, len(ways)))
    counted.passes = 0
    np.testing.assert_array_equal(shared.of(images).values, expected[0])  # never flipped, and shared with training's
    assert counted.passes == 0


def packed(model, **settings):
    default = {
        "quantization_bits": 4,
        "quantization_type": "nf4",
        "use_group_quantization": True,
        "group_size": 16,
        "rank": 1,
    }
    return QALoRATrainer(model, QaLoraConfig(**{**default, **settings}), 1, seed=0)


PROVENANCES = {
    "weights": {"weights_sha256": "b" * 64},
    "configuration": {"config_sha256": "c" * 64},
    "data": {"data_sha256": "e" * 64},
    "device": {"device": "cuda"},
    "processor": {"processor": "q"},
    "bits of integers": {"integer_bits": 7},
    "timm": {"packages": {"timm": "2"}},
    "transformers": {"packages": {"timm": "1", "transformers": "5"}},
}
CHANGES = {
    "precision": lambda spec: spec.model_copy(update={"precision": "bf16"}),
    "threads": lambda spec: spec.model_copy(update={"threads": 3}),
    "blocks": lambda spec: spec.model_copy(update={"backbone": spec.backbone.model_copy(update={"head_blocks": 4})}),
    "image size": lambda spec: spec.model_copy(update={"data": spec.data.model_copy(update={"image_size": 64})}),
}


@pytest.mark.parametrize("change", [*PROVENANCES, *CHANGES])
def test_what_differs_is_not_shared(counted, spec, images, tmp_path, change) -> None:
    counted.features(spec).of(images)
    other = CHANGES.get(change, lambda spec: spec)(spec)
    counted.features(other, **PROVENANCES.get(change, {})).of(images)
    assert counted.passes == len(files(tmp_path)) == 2


@pytest.mark.parametrize("limit", ["ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA"])
def test_what_other_instructions_have_computed_is_not_taken(
    counted, spec, images, tmp_path, monkeypatch, limit
) -> None:
    counted.features(spec).of(images)
    if limit == "ATEN_CPU_CAPABILITY":  # PyTorch reads it when it is loaded
        monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "DEFAULT")
    else:
        monkeypatch.setenv(limit, "AVX")
    counted.features(spec).of(images)
    assert counted.passes == len(files(tmp_path)) == 2


def test_weights_that_are_packed_alike_are_shared_and_others_are_not(counted, spec, images, tmp_path, tiny_vit) -> None:
    counted.features(spec).of(images)
    for settings in (
        *({"quantization_type": type} for type in ("fp4", "nf4", "int4")),
        {"quantization_schedule": "linear"},
        {"rank": 2},  # as nf4 above
    ):
        counted.features(spec, [packed(tiny_vit(), **settings)]).of(images)
    assert counted.passes == len(files(tmp_path)) == 5


@pytest.mark.parametrize("spoil", ["bytes", "empty", "not finite", "length", "names"])
def test_a_spoiled_file_is_computed_anew_with_a_warning(counted, spec, images, tmp_path, caplog, spoil) -> None:
    first = counted.features(spec).of(images)
    (file,) = files(tmp_path)
    content = load_file(file)
    if spoil == "bytes":
        file.write_bytes(file.read_bytes()[:-7])
    elif spoil == "empty":
        file.write_bytes(b"")
    elif spoil == "not finite":
        content["values"][3, 3] = np.nan
        save_file(content, file)
    elif spoil == "length":
        save_file(content | {"places": content["places"][:-1]}, file)
    else:
        save_file({"values": content["values"]}, file)
    counted.passes = 0
    with caplog.at_level("WARNING"):
        again = counted.features(spec).of(images)
    assert counted.passes == 1
    np.testing.assert_array_equal(again.values, first.values)
    (warning,) = caplog.messages
    assert warning.startswith(f"{file} can't be used (")
    assert warning.endswith("; features are computed again")
    caplog.clear()
    counted.features(spec).of(images)
    assert (counted.passes, caplog.messages) == (1, [])


def test_random_weights_and_adapters_to_go_on_from_are_never_kept(counted, spec, images, tmp_path) -> None:
    shared = counted.features(spec, random_weights=True)
    np.testing.assert_array_equal(shared.of(images).values, shared.of(images).values)
    assert counted.passes == 2
    lora = spec.experiment.lora.model_copy(update={"start": "adapter"})
    going_on = spec.model_copy(update={"experiment": spec.experiment.model_copy(update={"lora": lora})})
    counted.features(going_on).of(images)
    assert counted.passes == 3
    assert files(tmp_path) == []


def test_a_cache_that_cannot_be_written_is_said(counted, spec, images, tmp_path, caplog) -> None:
    (tmp_path / "cache").write_text("a file in its place")
    with caplog.at_level("WARNING"):
        features = counted.features(spec).of(images)
    assert features.values.shape == (10, 64)
    assert any("can't be written" in message for message in caplog.messages)
