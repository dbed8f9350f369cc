"""A feature whose packages are missing or too old is one line with the command that installs them."""

import importlib.metadata
import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from peft_vit.base import extras
from peft_vit.base.errors import UserError
from peft_vit.base.extras import EXTRAS, missing_packages, require_extra

PROJECT = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8"))["project"]
DECLARED = PROJECT["optional-dependencies"]


def _resolved(extra: str) -> dict[str, str]:
    """Return the packages of an extra by name, those of extras that it names too, each with its oldest version."""
    packages: dict[str, str] = {}
    for requirement in map(Requirement, DECLARED[extra]):
        if requirement.name == PROJECT["name"]:
            for other in requirement.extras:
                packages |= _resolved(other)
        else:
            packages[requirement.name] = str(requirement.specifier).removeprefix(">=")
    return packages


def test_the_table_is_that_of_the_package() -> None:
    assert {name: _resolved(name) for name in DECLARED if name not in ("all", "docs", "dev")} == EXTRAS
    assert _resolved("all") == {package: oldest for needed in EXTRAS.values() for package, oldest in needed.items()}
    assert _resolved("all").items() <= _resolved("dev").items()


def test_what_is_missing_is_one_line(without) -> None:
    require_extra("onnx", "ONNX export")
    without("onnxruntime")
    with pytest.raises(UserError) as caught:
        require_extra("onnx", "ONNX export")
    assert str(caught.value) == "ONNX export needs the package onnxruntime; run: pip install 'peft-vit[onnx]'"
    require_extra("onnx", packages=("onnx",))
    without("onnxscript", "onnx")
    with pytest.raises(UserError) as two:
        require_extra("onnx", file="model.onnx")
    said = "model.onnx: needs the packages onnx, onnxscript and onnxruntime; run: pip install 'peft-vit[onnx]'"
    assert str(two.value) == said


@pytest.mark.parametrize(
    ("installed", "fault"), [("3.9.1", " from version 4 (not 3.9.1)"), ("4.0.0", None), (None, None)]
)
def test_a_version_that_is_too_old_is_missing_and_another_distribution_may_bring_it(
    monkeypatch, installed, fault
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(importlib.metadata, "version", version)
    assert missing_packages("hf") == ([] if fault is None else [f"datasets{fault}"])


def test_a_folder_of_that_name_is_no_package(tmp_path, monkeypatch) -> None:
    (tmp_path / "not_a_package_of_anybody").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(extras, "EXTRAS", {"some": {"not_a_package_of_anybody": "1"}})
    with pytest.raises(UserError, match=re.escape("needs the package not_a_package_of_anybody; run: pip install")):
        require_extra("some")
