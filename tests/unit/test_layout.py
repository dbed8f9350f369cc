"""The product stands without the research: what it is made of names nothing in experiments/, but for one page."""

import re
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
FOLDERS = ("src", "tests", "docs", "examples", "benchmarks", ".ci", ".github")
_TEXTS = {".py", ".md", ".yaml", ".yml", ".ipynb", ".html", ".css", ".js", ".txt", ""}
THE_PAGE = "docs/what_we_found.md"  # which says where a reader finds more
# A path in a text, or one put together; a fraction and a configuration's key are neither.
_PATH = re.compile(r"""experiments/[\w*]|/ ["']experiments["']|["']experiments["'] /""")
_IMPORT = re.compile(r"^\s*(from|import) experiments\b", re.MULTILINE)


def names_research(root: Path) -> list[str]:
    """Return the product's files that import, read or link to what lies in experiments/."""
    naming = []
    for folder in FOLDERS:
        for file in sorted((root / folder).rglob("*")):
            place = file.relative_to(root).as_posix()
            made = "__pycache__" in file.parts or "peft_vit.egg-info" in file.parts  # by pip, out of README
            if not file.is_file() or file.suffix not in _TEXTS or made:
                continue
            text = file.read_text(encoding="utf-8")
            may_name = place == THE_PAGE or file == Path(__file__)
            if (_PATH.search(text) and not may_name) or (file.suffix == ".py" and _IMPORT.search(text)):
                naming.append(place)
    return naming


def test_nothing_of_the_product_names_the_research() -> None:
    assert names_research(ROOT) == []


def test_the_product_is_tested_without_the_research() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    rules = re.findall(r"^([a-z0-9-]+):.*\n((?:\t.*\n)+)", makefile, re.MULTILINE)
    with_research = {target for target, recipe in rules if "experiments" in recipe}
    assert with_research == {"test-research", "test-all", "clean"}


def test_a_file_is_known_by_its_wing_and_name() -> None:
    package = ROOT / "src" / "peft_vit"
    names = Counter((file.relative_to(package).parts[0], file.name) for file in package.rglob("*.py"))
    assert [place for place, count in names.items() if count > 1 and place[1] != "__init__.py"] == []
