"""Large folders: how long until something is said, until images are read, until a training begins, and what memory.

JPEGs of 64 px and 8 classes, noise whose mean colour says the class, are written once to FOLDER/<count>. Each count is
read in a process of its own, twice: listing, hashes and heads of all files, pixels of at most 20,000. `--train` goes
through `train` with that method instead. Seconds are those of the processor, so that other work on the machine does not
count, beside those of the clock; memory of a call's processes has each page once (PSS). A row a line goes to
`benchmarks/results/large_folders.csv`.

Files that the system has in memory are hashed in 30, 33 and 39 us each, of 2,000, 20,000 and 200,000; a first pass of
200,000 took 74 to 94. That the disk is the cause, and of the figure's power above 1, is likely; it was not shown.

    python benchmarks/large_folders.py 2000 20000 200000
    python benchmarks/large_folders.py 20000 --train linear --minutes 5
    python benchmarks/large_folders.py --figure
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
from common import RESULTS, append_row, parser, rows_of
from PIL import Image

FILE = RESULTS / "large_folders.csv"
FIGURE = Path(__file__).parents[1] / "docs" / "images" / "large_folders.png"
COLUMNS = ("images", "what", "processor_s", "clock_s", "memory_mb", "commit")
CLASSES, SIDE, _WAIT_S = 8, 64, 0.2
STAGES = {  # of `train`, by how the first line of what comes after begins
    "first line": "",
    "images read": "image sizes",
    "first regression": "  linear probe at",
    "first training begins": "a first model",
}


def written(folder: Path, count: int) -> Path:
    """Return a folder of so many JPEGs, written unless they are there."""
    rng, root = np.random.default_rng(0), folder / str(count)
    colours = rng.integers(40, 216, (CLASSES, 3))
    for k in range(CLASSES):
        (root / f"class_{k}").mkdir(parents=True, exist_ok=True)
    if sum(len(files) for _, _, files in os.walk(root)) == count:
        return root
    for i in range(count):
        noise = rng.integers(-128, 128, (SIDE // 4, SIDE // 4, 3)).repeat(4, 0).repeat(4, 1)
        pixels = np.clip(colours[i % CLASSES] + noise, 0, 255).astype(np.uint8)  # (64, 64, 3)
        Image.fromarray(pixels).save(root / f"class_{i % CLASSES}" / f"{i:06d}.jpg", quality=75)
    return root


def read(root: Path) -> Iterator[tuple[str, float, float, float]]:
    """Read a folder twice; yield what was done, processor's and clock's seconds, and the peak of memory in MB."""
    from peft_vit.data import find_images, images_file, inspect_images
    from peft_vit.data.inspection.decoding import read_heads

    for turn in ("first", "again"):
        found = find_images(root)
        names = list(found.classes)
        steps = {
            "listed": lambda: find_images(root),
            "hashed": lambda found=found, names=names: found.tree.hashed(names),
            "heads": lambda found=found, names=names: read_heads(found.tree, names),
            "pixels compared": lambda found=found: images_file(inspect_images(found)),
        }
        for what, step in steps.items():
            began, clock = time.process_time(), time.perf_counter()
            step()
            memory = psutil.Process().memory_info()
            yield f"{turn}: {what}", time.process_time() - began, time.perf_counter() - clock, memory.rss / 1e6


def trained(root: Path, method: str, minutes: float, place: str) -> Iterator[tuple[str, float, float, float]]:
    """Go through `train`; yield what was reached, processor's and clock's seconds, and the peak of memory in MB."""
    options = ["--method", method, "--minutes", f"{minutes:g}", "--threads", "1", "--output", f"{place}/out"]
    command = [sys.executable, "-m", "peft_vit.cli", "train", str(root), *options]
    with Path(place, "lines.txt").open("w+") as lines:
        began, child = time.perf_counter(), psutil.Popen(command, stdout=lines, stderr=subprocess.STDOUT, text=True)
        left, seconds, memory = dict(STAGES), dict[int, float](), 0.0
        while True:
            ended = child.poll() is not None
            in_mb = 0.0
            for process in [] if ended else [child, *child.children(recursive=True)]:
                try:
                    times, in_mb = process.cpu_times(), in_mb + process.memory_full_info().pss / 1e6
                    seconds[process.pid] = times.user + times.system
                except psutil.NoSuchProcess:  # it has ended
                    continue
            memory = max(memory, in_mb)
            said = Path(lines.name).read_text().splitlines()
            for what, start in list(left.items()):
                if any(line.startswith(start) for line in said):
                    yield f"{method}: {what}", sum(seconds.values()), time.perf_counter() - began, memory
                    del left[what]
            if ended:
                break
            time.sleep(_WAIT_S)
    yield f"{method}: all, exit {child.returncode}", sum(seconds.values()), time.perf_counter() - began, memory


def draw() -> None:
    """Draw what reading takes, by images, with a line through each step in logarithms, but not where it is of some."""
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6.4, 3.2), dpi=110)
    rows = [row for row in rows_of(FILE) if row["what"].startswith("first: ")]
    for what in dict.fromkeys(row["what"] for row in rows):
        own = {int(row["images"]): float(row["processor_s"]) for row in rows if row["what"] == what}
        images, seconds = (np.array(values) for values in zip(*sorted(own.items()), strict=True))
        name = what.removeprefix("first: ")
        if name == "pixels compared":  # of at most 20,000 images: no power
            axes.loglog(images, seconds, "o", color="grey", label="pixels compared,\nof at most 20,000")
            continue
        slope, start = np.polyfit(np.log(images), np.log(seconds), 1)
        (points,) = axes.loglog(images, seconds, "o", label=f"{name}: power {slope:.2f}")
        axes.loglog(images, np.exp(start) * images**slope, color=points.get_color(), linewidth=1)
    axes.set(xlabel="images", ylabel="seconds of one core")
    axes.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1, 1))
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(FIGURE)
    print(FIGURE)


def main() -> None:
    """Read the command line, and measure."""
    from peft_vit.runs.this_machine.machine import git_state

    options = parser(__doc__)
    options.add_argument("counts", type=int, nargs="*")
    options.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "large"))
    options.add_argument("--train", help="a method of train")
    options.add_argument("--minutes", type=float, default=5.0)
    options.add_argument("--figure", action="store_true", help="draw what was measured")
    options.add_argument("--alone", action="store_true", help="measure in this process")
    arguments = options.parse_args()
    for count in arguments.counts:
        root = written(arguments.folder, count)
        with tempfile.TemporaryDirectory(dir=arguments.folder) as place:
            if not (arguments.train or arguments.alone):  # else the peak of memory would be another count's
                again = [sys.executable, __file__, str(count), "--alone", "--folder", str(arguments.folder)]
                subprocess.run(again, check=True)
                continue
            os.environ["PEFT_VIT_CACHE"] = f"{place}/cache"
            measured = trained(root, arguments.train, arguments.minutes, place) if arguments.train else read(root)
            for what, processor_s, clock_s, memory_mb in measured:
                values = (count, what, processor_s, clock_s, memory_mb, git_state()[0])
                row = dict(zip(COLUMNS, values, strict=True))
                print(f"{count:>8,} {what:32} {processor_s:8.2f} s {clock_s:8.2f} s {memory_mb:6,.0f} MB", flush=True)
                append_row(FILE, COLUMNS, row)
    if arguments.figure:
        draw()


if __name__ == "__main__":
    main()
