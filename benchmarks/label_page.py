"""What the page of `peft-vit label` is like to work with: a script labels a folder in Chromium, as a person would.

    python benchmarks/label_page.py FOLDER [--labels 100] [--more 100] [--train] [--pictures FOLDER]

`FOLDER` holds a folder a class. Their images are copied flat into a folder without labels, `peft-vit label` is started
on it as a process of its own, and each image is answered by keys and clicks until so many labels are there, or all;
with `--more`, as many again once features are computed of all.
Printed: seconds from the command to the first image; seconds from a key to the next image, while features are computed
and afterwards; how many were computed at the first and the last answer; the most memory of the server and of the
process that computes, each page of memory counted once (PSS). With `--train` the page's button trains on the labels,
and the seconds until the model is there are printed with what it says.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import threading
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from time import monotonic, sleep
from typing import Any

import numpy as np
import psutil
from playwright.sync_api import sync_playwright

CHROMIUM = os.environ.get("PEFT_VIT_CHROMIUM", "/usr/bin/chromium")
_PATIENCE_MS = 1_800_000


def without_labels(source: Path, folder: Path) -> dict[str, str]:
    """Copy the images of class folders into one folder, under names that say nothing; return each name's class."""
    files, truth = [file for file in sorted(source.glob("*/*")) if file.is_file()], {}
    for number, place in enumerate(np.random.default_rng(0).permutation(len(files))):
        name = f"{number:06}{files[place].suffix}"
        shutil.copyfile(files[place], folder / name)
        truth[name] = files[place].parent.name
    return truth


class Memory(threading.Thread):
    """Watches what a process and its children hold: `most`, in bytes."""

    def __init__(self, pid: int) -> None:
        super().__init__(daemon=True)
        self.most, self._watched = 0, psutil.Process(pid)

    def run(self) -> None:
        """Look twice a second until the process has ended."""
        with suppress(psutil.NoSuchProcess):
            while self._watched.is_running():
                now = 0
                for one in (self._watched, *self._watched.children(recursive=True)):
                    with suppress(psutil.Error):
                        now += one.memory_full_info().pss
                self.most = max(self.most, now)
                sleep(0.5)


class Person:
    """Answers what the page asks by what is true; `by_hand` counts keys and clicks, a typed name as one.

    `waits` are the seconds from an answer to the next image, while features are computed (True) and afterwards.
    """

    def __init__(self, page: Any, truth: dict[str, str], pictures: Path | None) -> None:
        self.page, self.truth, self.pictures = page, truth, pictures
        self.by_hand = 0
        self.waits: dict[bool, list[float]] = {True: [], False: []}
        self._seen: set[str] = set()

    def labelled(self) -> int:
        """Return how many images are labelled, as the page says."""
        return int(self.page.inner_text("#counted").replace(",", "").split()[0])

    def computed(self) -> str:
        """Return how many features are there, as the page says."""
        return self.page.get_attribute("#ready", "value") if self.page.is_visible("#computing") else "all"

    def answer(self) -> bool:
        """Answer what is shown; return False where nothing is left."""
        page, question = self.page, self.page.inner_text("#question")
        if question == "All images are labelled.":
            return False
        kind = "wall" if page.is_visible("#wall") else "proposed" if page.is_visible("#take") else "image"
        if self.labelled() >= 3 and kind not in self._seen:
            self._seen.add(kind)
            self.look(kind)
        classes = page.eval_on_selector_all("#known option", "options => options.map((option) => option.value)")
        typed, key = "", "Enter"
        if kind == "wall":
            said = question.removeprefix("All ").partition("?")[0]
            names = page.eval_on_selector_all("#wall img", "images => images.map((image) => image.alt)")
            for place in (place for place, name in enumerate(names) if self.truth[name] != said):
                page.click(f"#wall button:nth-child({place + 1})")
                self.by_hand += 1
        elif (says := self.truth[question]) not in classes:
            typed = says
            if classes:
                page.keyboard.press("n")
                self.by_hand += 1
        elif kind != "proposed" or not page.inner_text("#take").endswith(says):
            key = page.inner_text(f"#classes button:nth-child({classes.index(says) + 1}) kbd").lower()
        if typed:
            page.keyboard.type(typed)
        computing, started = page.is_visible("#computing"), monotonic()
        page.keyboard.press(key)
        page.locator("#main:not([aria-busy=true])").wait_for()
        self.waits[computing].append(monotonic() - started)
        self.by_hand += 1 + bool(typed)
        if not page.is_hidden("#fault"):
            raise SystemExit(f"{question}: {page.inner_text('#fault')}")
        return True

    def answer_until(self, labels: int) -> None:
        """Answer until so many images are labelled, or all."""
        while self.labelled() < labels and self.answer():
            pass

    def tell(self) -> None:
        """Print the seconds that the next images took."""
        for computing, waits in self.waits.items():
            if waits:
                when = "while features are computed" if computing else "afterwards"
                took = f"{np.median(waits):.2f} s (median), {max(waits):.2f} at most"
                print(f"the next image after {took}, {when} ({len(waits)} answers)")

    def look(self, name: str) -> None:
        """Take pictures of the page, light and dark, wide and on a phone."""
        if not self.pictures:
            return
        self.page.wait_for_timeout(1000)  # images of a wall
        for width, height in ((900, 640), (390, 844)):
            for scheme in ("dark", "light"):
                self.page.emulate_media(color_scheme=scheme)
                self.page.set_viewport_size({"width": width, "height": height})
                self.page.screenshot(path=self.pictures / f"{name}_{width}_{scheme}.png")
        self.page.set_viewport_size({"width": 1200, "height": 844})


def started(images: Path) -> tuple[subprocess.Popen[str], Memory, str]:
    """Start `peft-vit label` on a folder, from the folder above; return it, what it holds, and its page's address."""
    command = [sys.executable, "-m", "peft_vit.cli", "label", str(images), "--no-browser"]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=images.parent)
    memory = Memory(server.pid)
    memory.start()
    assert server.stdout is not None
    address = next(word for line in server.stdout for word in line.split() if word.startswith("http://"))
    threading.Thread(target=server.stdout.read, daemon=True).start()
    return server, memory, address


def main() -> None:
    """Label, and print what it took."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folder", type=Path)
    asked.add_argument("--labels", type=int, help="all, if not given")
    asked.add_argument("--more", type=int, default=0, help="labels after all features are computed")
    asked.add_argument("--train", action="store_true", help="press the page's button afterwards")
    asked.add_argument("--pictures", type=Path, help="a folder for pictures of each view")
    options = asked.parse_args()
    if options.pictures:
        options.pictures.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as temporary, sync_playwright() as driver:
        images = Path(temporary, "images")
        images.mkdir()
        truth = without_labels(options.folder, images)
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        page = browser.new_page(viewport={"width": 1200, "height": 844})
        page.set_default_timeout(_PATIENCE_MS)
        begun = monotonic()
        server, memory, address = started(images)
        page.goto(address)
        page.locator("#image:not([hidden])").evaluate("(image) => image.decode()")
        print(f"{len(truth):,} images; the first is seen after {monotonic() - begun:.1f} s", flush=True)
        person = Person(page, truth, options.pictures)
        at_first = person.computed()
        wanted = options.labels or len(truth)
        person.answer_until(wanted)
        seconds, labels = monotonic() - begun, person.labelled()
        print(f"{labels:,} labels by {person.by_hand:,} keys and clicks, {seconds:.0f} s after the command")
        print(f"features computed at the first answer: {at_first}; at the last: {person.computed()}", flush=True)
        if options.more:
            page.locator("#computing").wait_for(state="hidden")
            print(f"all features after {monotonic() - begun:.0f} s")
            person.answer_until(wanted + options.more)
        person.tell()
        print(f"memory: {memory.most / 1e6:,.0f} MB at most", flush=True)
        person.look("labelled")
        if options.train:
            begun = monotonic()
            page.click("#train")
            page.locator("#train:disabled").wait_for()
            page.locator("#train:enabled").wait_for()
            person.look("trained")
            print(f"trained in {monotonic() - begun:.0f} s:", page.inner_text("#said")[-600:], sep="\n")
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
