"""Seconds of an epoch and of decoding by images and GPUs: the table of docs/how_to/laptop_to_cluster.md, checked.

A step is of 32 images on each GPU and takes what is assumed; then each of N processes sends 2 (N - 1) / N of the
trained values once (ring all-reduce, Patarasu and Yuan 2009), and no faster than the network. Every process decodes all
images once, with eight cores. Of this only the rates of decoding were measured; `--rates` measures them again.

    python benchmarks/cluster_arithmetic.py
    python benchmarks/cluster_arithmetic.py --rates
"""

from __future__ import annotations

import io
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
from common import parser
from PIL import Image

PAGE = Path(__file__).parents[1] / "docs" / "how_to" / "laptop_to_cluster.md"
IMAGES, GPUS = (1_000, 10_000, 100_000, 1_000_000), (1, 4, 32)
BATCH, STEP_S = 32, 0.1  # images on each GPU; assumed
SENT_BYTES, BANDWIDTH = 2.7e6, 110e6  # LoRA of rank 8 on ViT-S; bytes a second of gigabit Ethernet
CORES, RATES = 8, {64: 1_600, 500: 270}  # of a process; JPEGs of that side to 224 px, a second and core, as measured


def epoch_s(images: int, gpus: int) -> float:
    """Return the seconds of an epoch: steps, each with the reduction."""
    steps, reduction_s = -(-images // (BATCH * gpus)), 2 * (gpus - 1) / gpus * SENT_BYTES / BANDWIDTH
    return sum(STEP_S + reduction_s for _ in range(steps))


def shown(seconds: float) -> str:
    """Return a time in words, to two digits."""
    number, unit = (seconds, "s") if seconds < 100 else (seconds / 60, "min")
    return f"{number:.1f} {unit}" if number < 10 else f"{number:.0f} {unit}"


def rows() -> list[str]:
    """Return the lines of the page's table."""
    lines = []
    for images in IMAGES:
        epochs = [shown(epoch_s(images, gpus)) for gpus in GPUS]
        decoding = [shown(images / (rate * CORES)) for rate in RATES.values()]
        lines.append(f"| {' | '.join([f'{images:,}', *epochs, *decoding])} |")
    return lines


def measured_rate(side: int, files: int = 40, turns: int = 5) -> float:
    """Return how many JPEGs of a side become 224 px in a second of one core, the best of some turns."""
    from peft_vit.data import decode_image, to_pixels

    rng, contents = np.random.default_rng(0), []
    for _ in range(files):
        picture, file = Image.fromarray(rng.integers(0, 256, (side // 4, side // 4, 3), dtype=np.uint8)), io.BytesIO()
        picture.resize((side, side), Image.Resampling.BICUBIC).save(file, "JPEG", quality=85)
        contents.append(file.getvalue())
    seconds = []
    for _ in range(turns):
        began = time.process_time()
        for content in contents:
            to_pixels(decode_image(partial(bytes, content), "made up"), 224, 3)
        seconds.append(time.process_time() - began)
    return files / min(seconds)


def main() -> None:
    """Print the table, and fail if the page has another one."""
    options = parser(__doc__)
    options.add_argument("--rates", action="store_true", help="measure how fast images are decoded")
    for side in RATES if options.parse_args().rates else ():
        print(f"{side} px: {measured_rate(side):,.0f} images a second and core")
    print(*rows(), sep="\n")
    if missing := [row for row in rows() if row not in PAGE.read_text().splitlines()]:
        sys.exit(f"{PAGE} has not: {missing}")


if __name__ == "__main__":
    main()
