"""The documentation's site in a browser: it reaches level AA, light and dark."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import LEVEL_AA, axe_violations, context_of, needs_chromium, running_chromium

pytestmark = [pytest.mark.slow, needs_chromium]

ROOT = Path(__file__).parents[2]
PAGES = ("index.html", "tutorials/own_images.html", "reference/configuration.html", "explanation/statistics.html")


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    subprocess.run(command, cwd=ROOT, env={**os.environ, "NO_MKDOCS_2_WARNING": "1"}, check=True)
    return folder


@pytest.fixture(scope="module")
def browser() -> Iterator:
    with running_chromium() as running:
        yield running


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("page", PAGES)
def test_a_page_reaches_level_aa(browser, site: Path, page: str, scheme: str) -> None:
    """What axe recommends beyond it is the theme's: navigations of the same name, one at each block of code."""
    context = context_of(browser, color_scheme=scheme)
    shown = context.new_page()
    shown.goto((site / page).as_uri())
    assert shown.evaluate("document.body.dataset.mdColorScheme") == {"light": "default", "dark": "slate"}[scheme]
    assert axe_violations(shown, LEVEL_AA) == []
    context.close()
