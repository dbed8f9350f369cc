"""A map of where a model looked shows what it looks at, however large the image, and of tasks without a class there is
none.
"""

import numpy as np
import pytest
import torch
from tiny_models import CARD, random_model

from peft_vit.base.errors import UserError
from peft_vit.deploy import Classifier
from peft_vit.deploy.attended import attended
from peft_vit.deploy.explain import explain
from peft_vit.deploy.page.class_blocks import shortcut


def looking_at(size: int, corner: int) -> Classifier:
    """Return a model that says class 1 the more, the brighter a square at an offset from the upper left is."""

    def logits(images: np.ndarray) -> np.ndarray:
        scores = np.zeros((len(images), len(CARD.class_names)), np.float32)
        scores[:, 1] = images[:, :, corner : corner + 14, corner : corner + 14].mean((1, 2, 3))
        return scores

    return Classifier(logits, CARD.model_copy(update={"image_size": size, "channels": 3}))


@pytest.mark.parametrize(("size", "cells"), [(28, 2), (56, 4), (112, 8), (224, 8)])
def test_a_map_is_largest_where_the_model_looks(size, cells) -> None:
    image = np.zeros((size, size, 3), np.uint8)
    image[-14:, -14:] = 255
    looked = explain(looking_at(size, size - 14), image)
    assert (looked.class_name, looked.by) == (CARD.class_names[1], "occlusion")
    assert looked.weights.shape == (cells, cells)
    assert looked.weights[-1, -1] > 0.1
    others = looked.weights.copy()
    others[-1, -1] = 0
    assert np.abs(others).max() < 1e-6
    picture = np.asarray(looked.picture)
    assert picture.shape == (224, 224, 3)
    assert picture[-1, -1].min() > 250


def test_where_nothing_matters_a_veil_lies_over_all_and_grey_images_are_shown_too() -> None:
    looked = explain(looking_at(28, 0), np.full((28, 28), 100, np.uint8))
    assert not looked.weights.any()
    assert set(np.unique(looked.picture)) == {107}  # a quarter of 100, and the grey of the veil


def test_a_model_without_one_class_an_image_is_refused() -> None:
    numbers = Classifier(
        lambda images: np.zeros((len(images), 1), np.float32), CARD.model_copy(update={"task": "regression"})
    )
    with pytest.raises(UserError) as refused:
        explain(numbers, np.zeros((8, 8), np.uint8))
    assert (refused.value.field, "this one is of regression" in refused.value.message) == ("--explain", True)


@pytest.mark.parametrize("is_fused", [True, False])
def test_attention_tells_what_a_product_of_whole_matrices_tells(is_fused) -> None:
    model, weights = random_model("shallow_vit"), []

    def keep(_: torch.nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        output.retain_grad()
        weights.append(output)

    image = np.random.default_rng(0).normal(size=model.default_cfg["input_size"]).astype(np.float32)
    for block in model.blocks:
        block.attn.fused_attn = False
        block.attn.attn_drop.register_forward_hook(keep)
    model(torch.from_numpy(image[None])).log_softmax(-1).max().backward()
    relevance = np.eye(weights[0].shape[-1])
    for one in weights:
        relevance = relevance + (one * one.grad).clamp(min=0)[0].mean(0).detach().double().numpy() @ relevance
    patches = relevance[0, 1:]  # what the class token has of each
    for block in model.blocks:
        block.attn.fused_attn = is_fused
    looked = attended(model, image)
    assert looked is not None
    assert looked.ravel() == pytest.approx(patches, rel=1e-4, abs=1e-9)
    assert patches.max() > 0


def test_where_tokens_attend_within_windows_alone_there_is_no_such_map() -> None:
    class Windows(torch.nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            tokens = images.reshape(1, 1, -1, 4)
            whole = torch.nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
            part = torch.nn.functional.scaled_dot_product_attention(whole[:, :, :4], whole[:, :, :4], whole[:, :, :4])
            return part.mean((1, 2))

    assert attended(Windows(), np.ones((3, 8, 8), np.float32)) is None


def maps_with_largest(places: list[tuple[int, int]], side: int = 8) -> list[np.ndarray]:
    maps = np.zeros((len(places), side, side), np.float32)
    for one, place in zip(maps, places, strict=True):
        one[place] = 1
    return list(maps)


@pytest.mark.parametrize(
    ("places", "said"),
    [
        ([(0, 0), (1, 1), (0, 1), (4, 4)], "it looks at the upper left corner"),
        ([(7, 0), (6, 1), (7, 7), (7, 1)], "it looks at the lower left corner"),
        ([(0, 0), (0, 7), (7, 0), (7, 7)] * 2, "it looks at the edge"),
        ([(0, 0), (0, 7), (7, 0), (7, 7)], ""),  # 28 of 64 patches are on the edge: that may be chance
        ([(0, 0), (0, 7), (7, 0), (3, 3)] * 2, ""),
        ([(2, 2), (3, 4), (4, 3), (5, 5)], ""),
        ([(0, 0), (0, 0), (0, 0)], ""),  # too few to tell
    ],
)
def test_most_maps_of_a_class_in_one_corner_or_on_the_edge_are_a_shortcut(places, said) -> None:
    assert shortcut(maps_with_largest(places)) == said


def test_maps_of_few_cells_have_no_corner() -> None:
    assert shortcut(maps_with_largest([(0, 0)] * 20, side=3)) == ""
