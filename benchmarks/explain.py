"""Which map of where a model looked tells most: occlusion, gradient, attention, against two without a model.

    python benchmarks/explain.py RUN FOLDER [IMAGES]

For each map, patches go from the image, or come into its mean color, the largest first; it prints the mean probability
of the class that was said: low if they go (deletion), high if they come (insertion). RUN is of a Vision Transformer of
timm in patches of 14 whose class token alone is read.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import scipy.special
import torch

from peft_vit.api import open_classifier
from peft_vit.core.backbones import Backbone
from peft_vit.deploy.explain import explain
from peft_vit.deploy.predicting import image_files, prepared

PATCH, STEPS = 14, 9
run, folder, *count = sys.argv[1:]
classifier, generator = open_classifier(Path(run)), np.random.default_rng(1)
model = classifier.module
side = classifier.card.image_size // PATCH
assert model is not None
block = model.get_submodule(Backbone.within(model).blocks[-1])


def tokens_of(image: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
    """Return logits (1, classes), and the tokens that come to the last block, (1, T, D)."""
    seen: list[torch.Tensor] = []
    hook = block.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    logits = model(torch.from_numpy(image[None]).requires_grad_())
    hook.remove()
    return logits, seen[0]


def gradient_times_token(image: np.ndarray) -> np.ndarray:
    """Return the sum over a token of its values times the gradient of the class's log-probability, (patches,)."""
    logits, tokens = tokens_of(image)
    (gradient,) = torch.autograd.grad(logits.log_softmax(-1).max(), tokens)
    return (tokens * gradient).sum(-1)[0, -(side**2) :].detach().numpy()


@torch.no_grad()
def attention(image: np.ndarray) -> np.ndarray:
    """Return how much the class token reads of each patch in the last block, a mean over heads, (patches,)."""
    layer, (_, tokens) = block.attn, tokens_of(image)
    width = tokens.shape[-1] // layer.num_heads
    joined = layer.qkv(block.norm1(tokens)).reshape(1, tokens.shape[1], 3, layer.num_heads, width)
    query, key, _ = joined.permute(2, 0, 3, 1, 4)  # (1, heads, T, width) each
    weights = (query[:, :, :1] @ key.mT * layer.scale).softmax(-1)  # (1, heads, 1, T)
    return weights.mean(1)[0, 0, -(side**2) :].numpy()


def curves(image: np.ndarray, order: np.ndarray, said: int) -> tuple[float, float]:
    """Return the mean probability of a class while patches go, and while they come, in an order."""
    mean = np.broadcast_to(image.mean((1, 2), keepdims=True), image.shape)
    going, coming = [], []
    for known in np.linspace(0, side**2, STEPS).astype(int):
        is_known = np.isin(np.arange(side**2), order[:known]).reshape(side, side)
        mask = is_known.repeat(PATCH, 0).repeat(PATCH, 1)
        going.append(np.where(mask, mean, image))
        coming.append(np.where(mask, image, mean))
    shares = scipy.special.softmax(classifier.logits(np.stack(going + coming)), axis=1)[:, said]
    return float(shares[:STEPS].mean()), float(shares[STEPS:].mean())


rows = np.mgrid[:side, :side] - (side - 1) / 2
files = image_files([Path(folder)])
chosen = generator.permutation(len(files))[: int(count[0]) if count else 32]
images = [(files[i], prepared(files[i], classifier.card)) for i in chosen]
maps: dict[str, Callable[..., np.ndarray]] = {
    "random": lambda file, image: generator.random(side**2),
    "center": lambda file, image: -(rows**2).sum(0).ravel(),
    "occlusion": lambda file, image: explain(classifier, file).drops.ravel(),
    "gradient times token": lambda file, image: gradient_times_token(image),
    "attention": lambda file, image: attention(image),
}
for name, compute in maps.items():
    found = []
    for file, image in images:
        said = int(classifier.logits(image[None])[0].argmax())
        found.append(curves(image, np.argsort(-compute(file, image), kind="stable"), said))
    deletion, insertion = np.mean(found, axis=0)
    print(f"{name:21} deletion {deletion:.3f}  insertion {insertion:.3f}", flush=True)
