"""The wheel holds every file that the package reads; `.ci/wheel` builds one and runs it."""

import tomllib
from pathlib import Path

import yaml

import peft_vit

ROOT = Path(__file__).parents[2]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def test_every_file_beside_the_modules_is_named() -> None:
    package = Path(peft_vit.__file__).parent
    beside = {file for file in package.rglob("*") if file.is_file() and file.suffix not in (".py", ".pyc")}
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["peft_vit"]
    matching = {pattern: set(package.glob(pattern)) for pattern in patterns}
    assert set().union(*matching.values()) == beside
    assert all(matching.values()), "a pattern finds nothing"


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == PROJECT["project"]["version"]
    assert f"## [{citation['version']}]" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
