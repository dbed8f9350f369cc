"""The pictures of pages that the documents show, taken in a Chromium.

    .venv/bin/python docs/scripts/screenshots.py PAGE NAME [PAGE NAME ...]

Each PAGE becomes docs/images/NAME.png: `report` is peft-vit-runs/demo/report/report.html, of `make demo`, `tune`
the report.html of a tuning. PEFT_VIT_CHROMIUM names another Chromium.
"""

from __future__ import annotations

import io
import os
import shutil
import sys
from pathlib import Path

from PIL import Image
from playwright.sync_api import sync_playwright

from peft_vit import cli
from peft_vit.errors import UserError
from peft_vit.records import write_atomically

IMAGES = Path(__file__).resolve().parents[1] / "images"
_WIDTH, _HEIGHT = 1100, 845
_COLORS = 256  # enough for text and panels, at half the bytes


def take(pages: dict[str, Path]) -> None:
    """Write the first screen of each page to docs/images, by the picture's name.

    Raises:
        UserError: if there is no Chromium, or a page does not exist.
    """
    chromium = os.environ.get("PEFT_VIT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError("no Chromium was found; name one in PEFT_VIT_CHROMIUM")
    if missing := [page for page in pages.values() if not page.is_file()]:
        raise UserError("there is no such page; name the report.html of a study or of a tuning", file=missing[0])
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for name, page in pages.items():
            tab = browser.new_page(viewport={"width": _WIDTH, "height": _HEIGHT}, color_scheme="light")
            tab.goto(page.resolve().as_uri())
            write_atomically(IMAGES / f"{name}.png", _small(tab.screenshot()))
            print(IMAGES / f"{name}.png")
        browser.close()


def _small(png: bytes) -> bytes:
    content = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:  # noqa: TID251 - this format alone
        image.convert("RGB").quantize(_COLORS).save(content, format="png", optimize=True)
    return content.getvalue()


if __name__ == "__main__":
    asked = sys.argv[1:]
    if not asked or len(asked) % 2:
        sys.exit(__doc__)
    with cli.user_errors():
        take({name: Path(page) for page, name in zip(asked[::2], asked[1::2], strict=True)})
