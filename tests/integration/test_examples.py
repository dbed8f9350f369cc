"""Every study in examples/ loads, says what it asks, plans, and does smoke runs, at real width."""

import re
from functools import cache
from pathlib import Path

import pytest
from smoke_runs import check_smoke_run

from peft_vit.cli.model_commands import EXAMPLES as PACKAGED
from peft_vit.core.config import load_study
from peft_vit.runs.planned import Plan
from peft_vit.runs.scheduling.plan import plan_study

EXAMPLES = Path(__file__).parents[2] / "examples"
FILES = sorted(EXAMPLES.glob("*.yaml"))
pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.part("configuration")
def test_there_is_one_for_each_question_and_those_of_the_package_are_among_them() -> None:
    there = {file.name: file.read_text(encoding="utf-8") for file in FILES}
    packaged = {file.name: file.read_text(encoding="utf-8") for file in PACKAGED.iterdir()}
    assert packaged.keys() == {"demo.yaml", "quickstart.yaml"}
    assert there.items() > packaged.items()
    listed = re.findall(
        r"^\| \[(.+\.yaml)\]\(\1\) \|", (EXAMPLES / "README.md").read_text(encoding="utf-8"), re.MULTILINE
    )
    assert sorted(listed) == sorted(there)


@pytest.mark.part("configuration")
@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_it_opens_with_what_it_asks(file: Path) -> None:
    study = load_study(file)
    assert study.name == file.stem
    head = file.read_text(encoding="utf-8").split("\nname:")[0]
    assert all(word in head for word in ("Asks:", "Images:", "Weights:", "Command: peft-vit "))
    assert f"# Cost:    {len(study.experiments) * len(study.seeds)} runs" in head
    assert planned(file).runs


@cache
def planned(file: Path) -> Plan:
    study = load_study(file)
    plan = plan_study(study, Path("/nothing/is/done/here"), file=file, smoke=True)
    assert [run.spec.experiment.name for run in plan.pending] == [experiment.name for experiment in study.experiments]
    return plan


def experiments() -> list[object]:
    """Return all, file and place; slow are all but a probe and one of ranks and bits: unit tests do each small."""
    cases, quick = [], {"linear", "qa_adalora"}
    for file in FILES:
        for place, experiment in enumerate(load_study(file).experiments):
            marks = [] if experiment.method in quick else [pytest.mark.slow]
            cases.append(pytest.param(file, place, id=f"{file.stem}-{experiment.name}", marks=marks))
            quick.discard(experiment.method)
    return cases


@pytest.mark.part("runner")
@pytest.mark.parametrize(("file", "place"), experiments())
def test_smoke(file: Path, place: int, tmp_path: Path) -> None:
    check_smoke_run(planned(file).runs[place].spec, tmp_path)
