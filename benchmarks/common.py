"""What every benchmark here shares: one allocator for all sides, the machine's description, timing in turn."""

from __future__ import annotations

import argparse
import csv
import fcntl
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft_vit.runs.executors.local import ALLOCATOR

RESULTS = Path(__file__).parent / "results"
# glibc gives what is larger than 64 KiB back at once, and serves all threads from one arena.
RETURNING = {
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}


def with_tuned_allocator() -> None:
    """Start this process again with the allocator settings that peft-vit gives its workers, unless it has them."""
    with_allocator(ALLOCATOR)


def with_allocator(settings: Mapping[str, str]) -> None:
    """Start this process again with settings of glibc's allocator, unless it has them."""
    if any(os.environ.get(name) != value for name, value in settings.items()):
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **settings})


def parser(about: str | None, **defaults: int) -> argparse.ArgumentParser:
    """Return a parser with an option for each of these whole numbers: image_size is --image-size."""
    made = argparse.ArgumentParser(description=(about or "").splitlines()[0])
    for name, default in defaults.items():
        made.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    return made


def with_device(options: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add an option for where the sides compute."""
    options.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    return options


def with_one_side(options: argparse.ArgumentParser, sides: Iterable[str]) -> argparse.Namespace:
    """Return what is asked for, one side alone perhaps: this process is then one of `measured_alone`."""
    options.add_argument("--side", choices=[*sides], help="measure this one's memory only, in this process")
    options.add_argument("--bf16", action="store_true")
    return options.parse_args()


def measured_alone(
    file: str, sides: Iterable[str], options: argparse.Namespace, *, bf16: bool, numbers: int = 2
) -> Iterator[tuple[Any, ...]]:
    """Start a benchmark again for each side, in a process of its own; yield the numbers that each prints last."""
    for name in sides:
        size = ["--image-size", str(options.image_size), "--threads", str(options.threads)]
        command = [sys.executable, file, "--side", name, *size, *(["--bf16"] if bf16 else [])]
        done = subprocess.run(command, check=True, capture_output=True, text=True)
        yield name, *map(int, done.stdout.split()[-numbers:])


def machine(threads: int, device: str = "cpu") -> dict[str, Any]:
    """Describe where the numbers come from, and of which commit; a GPU by its name."""
    import peft
    import timm
    import torch

    from peft_vit.runs.this_machine.machine import cpu_count, git_state, instruction_sets, processor_name

    commit, changed = git_state()
    return {
        "commit": None if commit is None else f"{commit[:12]}{' and changes' if changed else ''}",
        "processor": processor_name(),
        "instructions": instruction_sets(),
        "limit": os.environ.get("ONEDNN_MAX_CPU_ISA"),
        **({"gpu": torch.cuda.get_device_name()} if device == "cuda" else {}),
        "cores": cpu_count(),
        "threads": threads,
        "platform": platform.platform(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "timm": timm.__version__,
        "peft": peft.__version__,
        "allocator": ALLOCATOR,
    }


def in_turn(
    sides: Mapping[str, Callable[[], Any]],
    rounds: int,
    warm_up: int = 2,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Call every side once a round, so that all see the same machine; return the seconds of each call by a clock."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for turn in range(warm_up + rounds):
        for name, call in sides.items():
            started = clock()
            call()
            if turn >= warm_up:
                seconds[name].append(clock() - started)
    return seconds


def table(title: str, seconds: Mapping[str, list[float]], over: str) -> list[dict[str, Any]]:
    """Print and return median, smallest time and ratio of medians to the side `over`."""
    print(f"\n{title}")
    base = statistics.median(seconds[over])
    rows = []
    for name, values in seconds.items():
        median = statistics.median(values)
        print(
            f"  {name:44} {1e3 * median:8.1f} ms   smallest {1e3 * min(values):8.1f}   ratio {median / base:5.3f}",
            flush=True,
        )
        rows.append(
            {
                "side": name,
                "median_s": round(median, 5),
                "smallest_s": round(min(values), 5),
                "n": len(values),
                "ratio": round(median / base, 4),
                "over": over,
            }
        )
    return rows


def write(name: str, content: dict[str, Any], folder: Path = RESULTS) -> None:
    """Write a result beside the others; that of a GPU, or of fewer instructions, beside that of a CPU."""
    folder.mkdir(exist_ok=True)
    where = content.get("machine")
    gpu, limit = (where.get("gpu"), where.get("limit")) if isinstance(where, dict) else (None, None)
    if gpu is not None:
        print(f"\nOn {gpu}")
    apart = "_gpu" if gpu else f"_{limit.lower()}" if limit else ""
    file = folder / f"{name}{apart}.json"
    file.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\nWritten: {file}")


def rows_of(file: Path) -> list[dict[str, str]]:
    """Return the rows of a table of results; none if it isn't there."""
    if not file.exists():
        return []
    with file.open(newline="") as lines:
        return list(csv.DictReader(lines))


def append_row(file: Path, columns: Sequence[str], row: Mapping[str, Any]) -> None:
    """Add a row to a table of results, numbers in four digits, while no other process does."""
    shown = {key: f"{value:.4g}" if isinstance(value, float) else value for key, value in row.items()}
    with file.open("a", newline="") as lines:
        fcntl.flock(lines, fcntl.LOCK_EX)
        out = csv.DictWriter(lines, columns, lineterminator="\n")
        if not file.stat().st_size:
            out.writeheader()
        out.writerow(shown)
