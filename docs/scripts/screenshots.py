"""The pictures of pages that the documents show, light and dark, taken in a Chromium.

    .venv/bin/python docs/scripts/screenshots.py NAME PAGE [IMAGE ...]

PAGE becomes docs/images/NAME.png and NAME_dark.png: `report` is peft-vit-runs/demo/report/report.html, of `make demo`,
`model` the report.html of a call of `train`, `browser` what `export --format web --offline` has written, which gets the
images. PEFT_VIT_CHROMIUM names another Chromium.
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
from peft_vit.base.errors import UserError
from peft_vit.base.files import write_atomically

IMAGES = Path(__file__).resolve().parents[1] / "images"
SIZES = {"report": (1100, 845), "model": (1100, 1846), "browser": (800, 1160)}  # in pixels
_COLORS = 256  # enough for text and panels, at half the bytes
_ALL_SAID = "n => [...document.querySelectorAll('.took')].filter((took) => took.textContent).length === n"


def take(name: str, page: Path, given: list[Path]) -> None:
    """Write the first screen of a page to docs/images, in both colour schemes.

    Args:
        name: of the picture, one of `SIZES`.
        page: what is shown.
        given: images for a page that predicts.

    Raises:
        UserError: if there is no such picture or file, or no Chromium.
    """
    chromium = os.environ.get("PEFT_VIT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome")
    if chromium is None:
        raise UserError("no Chromium was found; name one in PEFT_VIT_CHROMIUM")
    if name not in SIZES:
        raise UserError(f"there is no picture {name}; name one of {', '.join(SIZES)}")
    if missing := [file for file in (page, *given) if not file.is_file()]:
        raise UserError("there is no such file", file=missing[0])
    width, height = SIZES[name]
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        for scheme, picture in (("light", IMAGES / f"{name}.png"), ("dark", IMAGES / f"{name}_dark.png")):
            tab = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
            tab.goto(page.resolve().as_uri(), timeout=0)
            if given:
                tab.set_input_files("#choose", given)
                tab.wait_for_function(_ALL_SAID, arg=len(given), timeout=0)
            write_atomically(picture, _small(tab.screenshot()))
            print(picture)
        browser.close()


def _small(png: bytes) -> bytes:
    content = io.BytesIO()
    with Image.open(io.BytesIO(png), formats=("PNG",)) as image:  # noqa: TID251 - this format alone
        image.convert("RGB").quantize(_COLORS).save(content, format="png", optimize=True)
    return content.getvalue()


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    with cli.user_errors():
        take(sys.argv[1], Path(sys.argv[2]), [Path(image) for image in sys.argv[3:]])
