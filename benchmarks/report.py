"""How long a report of 1,000 runs takes to build, and its page to open.

    make bench      or      python benchmarks/report.py [--seeds 50] [--repeats 3]

The records are planted: 20 experiments x 50 seeds, 48 steps each, 72 sites with scores and ranks at every update. Each
build is the whole command `peft-vit report`, from the start of its process to the last file. The page is opened from
disk in a headless Chromium, if there is one, until its load event and until the next frame after it is drawn.
"""

from __future__ import annotations

import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import planted_study
from common import machine, parser, write

_READY = "() => new Promise(done => requestAnimationFrame(() => setTimeout(() => done(performance.now()), 0)))"


def main() -> None:
    """Measure, print, and write the result."""
    asked = parser(__doc__, seeds=50, repeats=3).parse_args()
    with tempfile.TemporaryDirectory(prefix="peft-vit-report-") as place:
        results, output = Path(place) / "results", Path(place) / "report"
        runs = planted_study.write(results, asked.seeds)
        record_bytes = sum(file.stat().st_size for file in results.rglob("record.json"))
        builds = [build(results, output) for _ in range(asked.repeats)]
        row = {
            "runs": runs,
            "record_bytes": record_bytes,
            "n": asked.repeats,
            "build_s": round(statistics.median(seconds for seconds, _ in builds), 2),
            "build_most_s": round(max(seconds for seconds, _ in builds), 2),
            "build_cpu_s": round(statistics.median(busy for _, busy in builds), 2),
            "page_bytes": (output / "report.html").stat().st_size,
            "all_bytes": sum(file.stat().st_size for file in output.rglob("*") if file.is_file()),
            **opening(output / "report.html", asked.repeats),
        }
    for name, value in row.items():
        print(f"  {name:24} {value}")
    write("report", {"machine": machine(1), "load_average": os.getloadavg()[0], "report": row})


def build(results: Path, output: Path) -> tuple[float, float]:
    """Return the seconds of one build, and those of a processor."""
    shutil.rmtree(output, ignore_errors=True)
    command = [str(Path(sys.executable).with_name("peft-vit")), "report", str(results), "--output", str(output)]
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    started = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - started
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def opening(page: Path, repeats: int) -> dict[str, Any]:
    """Return what opening the page takes in a fresh browser context; why it was not measured, where it was not."""
    chromium = os.environ.get("PEFT_VIT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        return {"open": "not measured: no Chromium here; name one in PEFT_VIT_CHROMIUM"}
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        return {"open": "not measured: the package playwright is not installed"}
    loads, frames = [], []
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for _ in range(repeats + 1):  # the first one also starts the browser's processes
            context = browser.new_context(viewport={"width": 1200, "height": 900})
            tab = context.new_page()
            tab.goto(page.as_uri(), wait_until="load")
            loads.append(tab.evaluate("() => performance.getEntriesByType('navigation')[0].loadEventEnd") / 1e3)
            frames.append(tab.evaluate(_READY) / 1e3)
            context.close()
        version = browser.version
        browser.close()
    return {
        "browser": f"Chromium {version}",
        "load_s": round(statistics.median(loads[1:]), 3),
        "load_most_s": round(max(loads[1:]), 3),
        "frame_s": round(statistics.median(frames[1:]), 3),
    }


if __name__ == "__main__":
    main()
