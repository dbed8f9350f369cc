"""The last block on the class token alone: the same logits and gradients, for models whose head reads nothing else."""

import pytest
import timm
import torch
from torch.nn import functional as F

from peft_vit.core.adapters import attach_adapters
from peft_vit.core.backbones import Backbone, find_sites
from peft_vit.core.backbones.passes import class_token_alone
from peft_vit.core.training.optimization import blocks_of, recomputed


@pytest.mark.parametrize("again", [False, True])
def test_logits_features_and_gradients_are_the_same(tiny_vit, batch, again) -> None:
    model = tiny_vit()
    attach_adapters(model, find_sites(model), 2, scale=1.0, seed=0)
    images, labels = batch
    widths = []
    model.blocks[-1].mlp.fc1.register_forward_pre_hook(lambda _, inputs: widths.append(inputs[0].shape[1]))

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        with recomputed(blocks_of(model) if again else ()):
            logits = model(images)
        F.cross_entropy(logits, labels).backward()
        return [logits.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]

    whole = gradients()
    features = Backbone(model).features(images)
    with class_token_alone(model):
        alone = gradients()
        torch.testing.assert_close(Backbone(model).features(images), features)
    assert {widths[0], widths[-1]} == {17, 1}  # tokens that the MLP saw
    for expected, got in zip(whole, alone, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-5)
    assert torch.equal(gradients()[0], whole[0])  # and afterwards all is as it was
    assert "forward" not in vars(model.blocks[-1])


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("vit_tiny_patch16_224", {"global_pool": "avg", "class_token": True}),
        ("deit_tiny_distilled_patch16_224", {}),
        ("eva02_tiny_patch14_224", {}),
        ("vit_base_patch16_siglip_224", {"depth": 1}),
    ],
)
def test_where_the_head_reads_more_all_tokens_are_computed(name, settings) -> None:
    model = timm.create_model(name, img_size=28 if "patch14" in name else 32, num_classes=3, **settings).eval()
    images = torch.randn(2, 3, *[28 if "patch14" in name else 32] * 2)
    with torch.no_grad():
        expected = model(images)
        with class_token_alone(model):
            assert torch.equal(model(images), expected)


def test_a_forward_of_another_library_stays(tiny_vit, batch) -> None:
    model = tiny_vit().eval()
    block, calls = model.blocks[-1], []
    plain = block.forward
    block.forward = lambda x: calls.append(x.shape[1]) or plain(x)
    with class_token_alone(model):
        model(batch[0])
    assert calls == [17]
