"""A Chromium of this machine, and what axe has to say of a page in it."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import product
from pathlib import Path
from typing import Any

import pytest

CHROMIUM = os.environ.get("PEFT_VIT_CHROMIUM") or shutil.which("chromium") or shutil.which("google-chrome") or ""
NO_CHROMIUM = "no Chromium here; name one in PEFT_VIT_CHROMIUM"
needs_chromium = pytest.mark.skipif(not os.access(CHROMIUM, os.X_OK), reason=NO_CHROMIUM)

_PATIENCE_MS = 600_000  # only ends what hangs
LEVEL_AA = ("wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa")
_RULES = (*LEVEL_AA, "best-practice")
# A figure's own texts are drawn in --ink and --muted, on which axe can't decide; unit tests measure their contrast.
_ON = {"exclude": [["figure svg > *"]]}
# What still fades in, such as what a search has found, has less contrast than it will have.
_AT_REST = """.drawing, .wide { content-visibility: visible !important }
*, ::before, ::after { transition: none !important }"""


@contextmanager
def running_chromium() -> Iterator[Any]:
    """Start it, and end it."""
    playwright = pytest.importorskip("playwright.sync_api", reason="the package playwright is not installed")
    arguments = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]
    with playwright.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield browser
        browser.close()


def context_of(browser: Any, **options: Any) -> Any:
    """Return a fresh context that waits as long as a busy machine needs."""
    context = browser.new_context(**{"viewport": {"width": 1200, "height": 900}, **options})
    context.set_default_timeout(_PATIENCE_MS)
    return context


def axe_violations(page: Any, rules: Sequence[str] = _RULES) -> list[str]:
    """Return what axe finds against accessibility on a whole page, with everything that is folded opened.

    Args:
        page: as it is shown in the browser.
        rules: axe's tags; the default is level AA of WCAG 2.0 to 2.2, and what axe recommends beyond it.
    """
    from axe_playwright_python.sync_playwright import Axe

    page.add_style_tag(content=_AT_REST)
    page.evaluate("document.querySelectorAll('details').forEach((fold) => (fold.open = true))")
    found = Axe().run(page, context=_ON, options={"runOnly": list(rules), "resultTypes": ["violations"]}).response
    assert len(found["passes"]) > 20  # rules that applied
    return [f"{one['id']}: {node['html'][:160]}" for one in found["violations"] for node in one["nodes"]]


def fits_the_screen(page: Any) -> bool:
    """Return whether nothing of a page is beyond the sides of the screen."""
    return bool(page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth"))


def check_page(file: Path) -> None:
    """Open a page in light and dark, on a screen and on a phone: it fits, and axe finds nothing."""
    with running_chromium() as browser:
        for scheme, width in product(("light", "dark"), (1280, 360)):
            context = context_of(browser, viewport={"width": width, "height": 740}, color_scheme=scheme)
            page = context.new_page()
            page.goto(file.as_uri())
            assert fits_the_screen(page)
            assert axe_violations(page) == []
            context.close()
