"""How far images are from known ones: in NumPy, in torch, in files of every format, and what predict makes of it."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from exported_files import packed_model
from numpy.typing import NDArray
from safetensors.numpy import save_file
from sklearn.neighbors import NearestNeighbors
from tiny_models import SHALLOW_CARD as CARD
from tiny_models import random_model

from peft_vit.base.errors import UserError
from peft_vit.base.statistics import Neighbours
from peft_vit.core.backbones import Backbone
from peft_vit.core.config import EXPORTS
from peft_vit.core.quantization import QuantizationFormat
from peft_vit.core.records import Unlike
from peft_vit.deploy import Classifier, ExportMetadata, open_exported, predict_files, writer_of
from peft_vit.runs.measures.neighbours import read_neighbours

WITH_UNLIKE = CARD.model_copy(update={"unlike": Unlike(images=40, threshold=1.0)})


def images(count: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(count, 3, 32, 32, generator=torch.Generator().manual_seed(seed))


def middle(model: torch.nn.Module, of: torch.Tensor) -> NDArray[np.float32]:
    with torch.inference_mode():
        return Backbone(model).logits_and_middle(of)[1].numpy()


def test_distances_are_those_of_a_nearest_neighbour_search() -> None:
    rng = np.random.default_rng(0)
    known, asked = rng.normal(3, 2, (300, 24)), rng.normal(3, 3, (600, 24))
    known[:, 5] = asked[:, 5] = 7.0  # tells nothing
    spread = np.where(known.std(0) > 0, known.std(0), 1)
    search = NearestNeighbors(n_neighbors=1).fit(known / spread)
    expected = search.kneighbors(asked / spread)[0][:, 0] / np.sqrt(24)
    np.testing.assert_allclose(Neighbours.of(known).distances(asked), expected, atol=0.02)
    assert Neighbours.of(known).distances(known).max() < 0.04  # what rounding to a sixteenth leaves


def test_what_comes_to_the_middle_block_is_its_class_token_or_the_mean_of_its_tokens() -> None:
    model, seen = random_model("test_vit").eval(), {}
    block = model.blocks[len(model.blocks) // 2]
    block.register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    found = middle(model, images(3))
    np.testing.assert_array_equal(found, seen["tokens"][:, 0].numpy())
    without = timm.create_model("test_vit", img_size=32, num_classes=5, class_token=False, global_pool="avg").eval()
    without.blocks[len(without.blocks) // 2].register_forward_pre_hook(lambda _, inputs: seen.update(tokens=inputs[0]))
    np.testing.assert_allclose(middle(without, images(3)), seen["tokens"].mean(1).numpy(), atol=1e-6)


@pytest.mark.parametrize("low_bit", [False, True])
@pytest.mark.parametrize("name", EXPORTS)
def test_a_file_tells_logits_as_before_and_distances_as_the_model(tmp_path: Path, name: str, low_bit: bool) -> None:
    model = random_model("shallow_vit").eval()
    if low_bit:
        model = packed_model([QuantizationFormat("int4", 32, True, torch.float16)], model)
    known = Neighbours.of(middle(model, images(50)))
    file = tmp_path / f"model{EXPORTS[name].ending}"
    writer_of(name)(model, file, WITH_UNLIKE, known)
    opened, asked = open_exported(file), images(5, seed=1)
    assert opened.card == WITH_UNLIKE
    assert opened.with_distances is not None
    logits, distances = opened.with_distances(asked.numpy())
    np.testing.assert_array_equal(logits, opened.logits(asked.numpy()))
    np.testing.assert_allclose(distances, known.distances(middle(model, asked)), rtol=2e-3)
    if name == "pretrained":
        (file / "features.safetensors").unlink()
        with pytest.raises(UserError, match="changed after it was written"):
            open_exported(file)
    elif name != "safetensors":
        plain = tmp_path / "plain" / file.name  # what was written before there were distances opens as it did
        plain.parent.mkdir()
        writer_of(name)(model, plain, CARD, None)
        assert open_exported(plain).with_distances is None
        np.testing.assert_allclose(open_exported(plain).logits(asked.numpy()), logits, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("distance", "unlike"), [(0.9, False), (1.1, True), (None, None)])
def test_predictions_say_whether_an_image_is_unlike_those_of_training(
    distance: float | None, unlike: bool | None
) -> None:
    logits = np.zeros((1, len(CARD.class_names)), np.float32)

    def both(_: NDArray[np.float32]) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
        return logits, np.array([distance], np.float32)

    card: ExportMetadata = CARD if distance is None else WITH_UNLIKE
    classifier = Classifier(lambda _: logits, card, None if distance is None else both)
    (prediction,) = predict_files(classifier, [np.zeros((8, 8, 3), np.uint8)])
    assert prediction.unlike is unlike  # type: ignore[union-attr]
    assert prediction.distance == pytest.approx(distance)  # type: ignore[union-attr]


_PARTS = {"mean": np.zeros(4, np.float32), "spread": np.ones(4, np.float32), "codes": np.zeros((2, 4), np.int8)}


@pytest.mark.parametrize(
    "changes",
    [
        {"codes": None},
        {"codes": np.zeros((2, 4), np.float32)},
        {"codes": np.zeros((0, 4), np.int8)},
        {"mean": np.zeros(3, np.float32)},
        {"mean": np.full(4, np.nan, np.float32)},
        {"spread": np.zeros(4, np.float32)},
        None,
    ],
)
def test_a_file_without_features_is_refused(
    tmp_path: Path, changes: dict[str, NDArray[np.generic] | None] | None
) -> None:
    file = tmp_path / "features.safetensors"
    file.write_bytes(b"nothing")
    if changes is not None:
        save_file({name: part for name, part in (_PARTS | changes).items() if part is not None}, file)
    with pytest.raises(UserError) as refused:
        read_neighbours(file)
    assert refused.value.file == str(file)
