"""LoRA's trainings, of which `spending` makes models: on all images of a draw and on two thirds, of several lengths.

    python -m experiments.floor.scripts.trainings FOLDER 84 --budget 96 --lengths 1 1/2 F1/3 F1/6

`FOLDER` is that of `sets`. A length is a part of the budget of steps; after F it is that of three trainings, each
without a third of the images, whose groups stay together. Each training is as in `tune`: rank 8 on all matrices, no
validation, the head of a regression on the training's own images to start from, labels smoothed, one cycle up to
1e-3. The head's temperature while training is that of all images for all of a draw, or heads could not be averaged.
What comes out is kept below `experiments/outputs/floor`: factors, head, seconds, logits of test images, or of the third
that was left out. What is there is not trained again.
"""

from __future__ import annotations

import argparse
import sys
import time
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from experiments.floor.scripts.images import CPU, Side, flips_of, pretrained, read_side, runtime_of
from experiments.floor.scripts.sets import DRAWS, SETS
from peft_vit.base.seeding import numpy_generator
from peft_vit.base.statistics.drawing import assign_folds
from peft_vit.core.adapters.adapted_model import site_adapters, use_float_matmul, use_int8_matmul
from peft_vit.core.backbones import Backbone, LoadedBackbone
from peft_vit.core.config import AUGMENTATION_OF_FLIPS, PROBE_L2, ExperimentConfig
from peft_vit.core.config.training import LABEL_SMOOTHING
from peft_vit.core.methods import METHODS
from peft_vit.core.methods.method import DEFAULT_RANK, PrepareContext
from peft_vit.core.tasks import CLASSIFICATION
from peft_vit.core.training import FLIP_AXES, Features, RuntimeConfig, fit_probe, head_inputs, held_out_fit, train
from peft_vit.core.training.images import Data, HoldoutImages, LabelledImages
from peft_vit.core.training.metrics import predict
from peft_vit.runs.this_machine import matmuls

OUTPUTS = Path("experiments/outputs/floor")
FOLDS, RATE = 3, 1e-3
_METRIC = CLASSIFICATION.metric("accuracy")


class Draw(NamedTuple):
    """A draw at an image size."""

    name: str
    number: int
    size: int
    train: Side
    test: Side
    blocks: int = 1  # whose class tokens the head reads, the last ones
    one_start: bool = False  # all trainings begin with the same factors

    @classmethod
    def read(cls, folder: Path, name: str, number: int, size: int, blocks: int = 1) -> Draw:
        """Read what `sets.write` has written."""
        train, test = (read_side(folder / f"{name}-{number}" / part, size) for part in ("train", "test"))
        return cls(name, number, size, train, test, blocks)

    def backbone(self) -> LoadedBackbone:
        """Load the pretrained model, with a head for what it reads."""
        backbone = pretrained(self.size, len(self.train.classes))
        if self.blocks > 1:
            read_blocks(backbone.model, self.blocks)
        return backbone

    @property
    def fold_of(self) -> NDArray[np.int64]:
        """Return which third each image to learn from is in."""
        return assign_folds(self.train.images.labels, self.train.groups, FOLDS, numpy_generator(0, "held_out"))

    def file(self, steps: int, fold: int | None) -> Path:
        """Return where a training is kept; fold: that it leaves out."""
        part = "all" if fold is None else f"fold{fold}"
        read = f"-of{self.blocks}" if self.blocks > 1 else ""
        read += "-shared" if self.one_start and fold is not None else ""
        return OUTPUTS / f"{self.name}-{self.number}-{self.size}{read}-{part}-{steps}.pt"


def read_blocks(model: Any, count: int) -> None:
    """Let the head of a VisionTransformer of timm read the class tokens of the last blocks, from the last on."""
    seen: dict[int, Tensor] = {}
    pool = model.pool
    for place in range(1, count):

        def see(_: Any, __: Any, output: Tensor, place: int = place) -> None:
            seen[place] = output[:, 0]  # (B, N, D) -> (B, D)

        model.blocks[-1 - place].register_forward_hook(see)

    def pooled(x: Tensor, pool_type: str | None = None) -> Tensor:
        before = [model.norm(seen[place]) for place in range(1, count)]
        return torch.cat([pool(x, pool_type), *before], dim=-1)  # (B, count D)

    model.pool = pooled
    model.head = nn.Linear(count * model.head.in_features, model.head.out_features)


class Start(NamedTuple):
    """What the head sees of a draw's images in each way in which they are shown, and its temperature in training."""

    ways: list[NDArray[np.float32]]
    l2: float  # of the regression on all of them
    temperature: float


def _probe(
    ways: list[NDArray[np.float32]], labels: Any, groups: Any, head: Any, runtime: RuntimeConfig, l2: Any = PROBE_L2
) -> Any:
    """Return a regression as a training starts from it, its features and its temperature on left-out images."""
    features = Features(np.concatenate(ways), np.tile(labels, len(ways)), CLASSIFICATION)
    l2, held_out = held_out_fit(features, groups, _METRIC, l2=l2)
    temperature = CLASSIFICATION.temperature(torch.from_numpy(held_out), torch.from_numpy(labels))
    return fit_probe(features, None, head, runtime, _METRIC, l2=(l2,)), features, temperature


def start_of(draw: Draw) -> Start:
    """Compute what the head sees, once for all trainings of a draw."""
    backbone = draw.backbone()
    runtime, model, side = runtime_of(backbone), backbone.model.requires_grad_(False), draw.train
    ways = [head_inputs(model, side.images, runtime, 32, axes) for axes in FLIP_AXES[flips_of(draw.name)]]
    probe, features, temperature = _probe(ways, side.images.labels, side.groups, Backbone(model).head, runtime)
    return Start(ways, probe.fit.chosen_l2, probe.training_temperature(features, temperature))


def train_once(draw: Draw, start: Start, steps: int, fold: int | None) -> None:
    """Train once, and keep what comes out."""
    began, side = time.perf_counter(), draw.train
    rows = np.flatnonzero(draw.fold_of != fold)  # all if there is none
    backbone = draw.backbone()
    runtime, model, seed = runtime_of(backbone), backbone.model, 0 if fold is None else 1 + fold
    training = {
        "learning_rate": RATE,
        "head_start": "probe",
        "steps": steps,
        "label_smoothing": LABEL_SMOOTHING,
        "augmentation": AUGMENTATION_OF_FLIPS[flips_of(draw.name)],
    }
    settings = {"name": "lora", "method": "lora", "training": training, "lora": {"rank": DEFAULT_RANK}}
    experiment = ExperimentConfig.model_validate(settings)
    METHODS["lora"].prepare(model, experiment, PrepareContext(total_steps=steps, seed=0 if draw.one_start else seed))
    choice = matmuls.choose_product(CPU, "bf16")
    if choice.matmul is not None:
        use_int8_matmul(model, choice.matmul)
    head = Backbone(model).head
    ways = [way[rows] for way in start.ways]
    probe, _, temperature = _probe(ways, side.images.labels[rows], side.groups[rows], head, runtime, (start.l2,))
    probe.set_head(head, temperature)
    nothing = LabelledImages(side.images.pixels[:0], side.images.labels[:0])
    data = Data(
        class_names=tuple(side.classes),
        train=side.images.chosen(rows),
        validation=nothing,
        test=HoldoutImages(nothing, np.zeros(len(side.classes), np.int64)),
        data_sha256="",
        split_sha256="",
        groups=np.arange(len(side.groups)),
    )
    result = train(model, data, experiment.training, runtime, seed=seed, temperature=start.temperature)
    use_float_matmul(model)
    seconds = time.perf_counter() - began
    content = {
        "factors": {name: adapter.exact_factors() for name, adapter in site_adapters(model).items()},
        "head": (head.weight, head.bias),
        "seconds": seconds,
        "step_s": result.seconds_per_step,
        "loss": [row.loss for row in result.steps],
    }
    for name, images in (
        ("held_out", side.images.chosen(np.flatnonzero(draw.fold_of == fold))),
        ("test", draw.test.images if fold is None else nothing),
    ):
        if len(images):
            content[name] = predicted(model, images, runtime)
    file = draw.file(steps, fold)
    file.parent.mkdir(parents=True, exist_ok=True)
    torch.save({name: _detached(value) for name, value in content.items()}, file.with_suffix(".new"))
    file.with_suffix(".new").rename(file)
    sys.stdout.write(f"{file.name} {seconds:.0f} s, {result.seconds_per_step:.2f} s a step, {time.ctime()}\n")
    sys.stdout.flush()


def predicted(model: Any, images: LabelledImages, runtime: RuntimeConfig) -> NDArray[np.float32]:
    """Return logits (N, classes)."""
    batches = images.ordered_batches(32, runtime.mean, runtime.std)
    return predict(model, batches, precision=runtime.precision)[0]


def _detached(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return value.detach().clone()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value)
    if isinstance(value, dict):
        return {name: _detached(own) for name, own in value.items()}
    return tuple(map(_detached, value)) if isinstance(value, tuple) else value


def main() -> None:
    """Do all draws."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folder", type=Path)
    asked.add_argument("size", type=int)
    asked.add_argument("--budget", type=int, default=96)
    asked.add_argument("--lengths", nargs="+", default=["1"])
    asked.add_argument("--draws", type=int, nargs="*", default=range(DRAWS))
    asked.add_argument("--sets", nargs="*", default=SETS)
    asked.add_argument("--blocks", type=int, default=1, help="whose class tokens the head reads")
    asked.add_argument("--one-start", action="store_true", help="all trainings begin with the same factors")
    given = asked.parse_args()
    for name, number in ((name, number) for number in given.draws for name in given.sets):
        draw, start = Draw.read(given.folder, name, number, given.size, given.blocks), None
        draw = draw._replace(one_start=given.one_start)
        for length in given.lengths:
            steps = int(given.budget * Fraction(length.removeprefix("F")))
            for fold in range(FOLDS) if length.startswith("F") else (None,):
                if not draw.file(steps, fold).exists():
                    start = start or start_of(draw)
                    train_once(draw, start, steps, fold)


if __name__ == "__main__":
    main()
