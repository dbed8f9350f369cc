"""The documentation's site in a browser, opened from a folder: it reaches level AA, light and dark, and is searched."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from chromium import LEVEL_AA, axe_violations, context_of, needs_chromium

pytestmark = [pytest.mark.slow, needs_chromium]

ROOT = Path(__file__).parents[2]
PAGES = (
    "index.html",
    "install.html",
    "tutorials/own_images.html",
    "tutorials/first_model.html",
    "tutorials/study.html",
    "how_to/deploy.html",
    "reference/configuration.html",
    "reference/python.html",
    "explanation/statistics.html",
    "what_we_found.html",
)
REPOSITORY = "https://example.org/somebody/peft-vit"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", folder]
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1", "PEFT_VIT_REPOSITORY": REPOSITORY}
    subprocess.run(command, cwd=ROOT, env=env, check=True)
    return folder


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


@pytest.fixture(params=["light", "dark"])
def shown(browser, request: pytest.FixtureRequest) -> Iterator:
    """Open pages, which ask for nothing outside their folder and meet no error."""
    context, asked, errors = context_of(browser, color_scheme=request.param), [], []
    page = context.new_page()
    page.on("request", lambda sent: asked.append(sent.url))
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    assert [url for url in asked if not url.startswith(("file:", "data:", "about:"))] == []
    assert errors == []
    context.close()


@pytest.mark.parametrize("page", ["index.html", "how_to/deploy.html"])
def test_search_works_from_a_folder(shown, site: Path, page: str) -> None:
    shown.goto((site / page).as_uri())
    shown.locator(".md-search__input").press_sequentially("orthogonal")
    found = shown.locator(".md-search-result__link").first
    found.wait_for()
    assert axe_violations(shown, LEVEL_AA) == []
    found.click()
    shown.wait_for_url("file://**?h=*")
    assert "orthogonal" in shown.locator("article").inner_text().lower()


def test_the_address_of_the_repository_is_one_setting(shown, site: Path) -> None:
    shown.goto((site / "install.html").as_uri())
    assert shown.locator(".md-header__source a").get_attribute("href") == REPOSITORY
    assert f"git+{REPOSITORY}" in shown.locator("article").inner_text()
    assert REPOSITORY in (site / "tutorials" / "first_model.ipynb").read_text(encoding="utf-8")
    assert [page for page in site.rglob("*.html") if "HOST/OWNER" in page.read_text(encoding="utf-8")] == []


def test_a_picture_follows_the_colour_scheme(shown, site: Path, request: pytest.FixtureRequest) -> None:
    shown.goto((site / "index.html").as_uri())
    (picture,) = [picture for picture in shown.locator("article img").all() if picture.is_visible()]
    assert picture.get_attribute("src").endswith(f"#only-{request.node.callspec.params['shown']}")
    assert picture.evaluate("picture => picture.naturalWidth") > 0
