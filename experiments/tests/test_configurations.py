"""Every configuration of the research loads and plans; few of their experiments do smoke runs, at real width.

They are chosen so that each value of each setting of each method, each backbone, kind of images and measure is tried.
"""

import re
from functools import cache
from pathlib import Path

import pytest
from smoke_runs import check_smoke_run

from experiments.scripts.evidence import EXPERIMENTS, study_files
from peft_vit.base.errors import UserError
from peft_vit.core.config import FORMER_RULES, ExperimentConfig, StudyConfig, load_study
from peft_vit.runs.scheduling.plan import Plan, plan_study, smoke_study

CONFIGS = study_files()
pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.part("configuration")
def test_the_promised_configurations_are_there() -> None:
    names = {file.stem for file in CONFIGS}
    assert names >= {
        "adalora_comprehensive_experiment",
        "qa_lora_comprehensive_experiment",
        "fixed_rank_baselines",
        "cifar100_vit_small",
        "tiny_imagenet_deit_small",
    }


def test_studies_with_kept_results_name_the_precision_of_these() -> None:
    """On a machine that only emulates bf16 they would be repeated in another one."""
    kept = {file.name.split(".")[0] for file in EXPERIMENTS.glob("*/results/*")}
    precisions = {file.stem: load_study(file).precision for file in CONFIGS if file.stem in kept}
    assert len(precisions) >= 13
    assert set(precisions.values()) == {"bf16"}


@pytest.mark.part("configuration")
@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_it_opens_with_what_it_asks(file: Path) -> None:
    study = load_study(file)
    assert study.name in file.stem
    header = file.read_text().split("\nname:")[0]
    program = "peft-vit run" if study.stopping is None else "python -m experiments.stopping.until_decided"
    command = f"Command: .venv/bin/{program} {file.relative_to(EXPERIMENTS.parent)}"
    assert all(word in header for word in ("Asks:", "Images:", "Weights:", "Cost:", command))
    (told,) = re.findall(r"^# Cost: +(\d+) runs", header, flags=re.MULTILINE)
    assert int(told) == len(study.experiments) * len(study.seeds)
    if study.backbone.weights == "hub":
        assert "NOT RUN" in header


def test_full_size_files_share_all_but_their_experiments() -> None:
    names = ("adalora_comprehensive_experiment", "qa_lora_comprehensive_experiment", "fixed_rank_baselines")
    studies = [load_study(EXPERIMENTS / "configs" / f"{name}.yaml") for name in names]
    shared = [study.model_dump(exclude={"name", "description", "experiments"}) for study in studies]
    assert shared[0] == shared[1] == shared[2]
    steps = {
        one.total_steps(study.data.train_images)
        for study in studies
        for one in study.experiments
        if study.data.train_images is not None and not one.is_probe
    }
    assert steps == {600}


@pytest.mark.part("importance analysis")
def test_one_of_them_measures_what_updates_are_worth() -> None:
    assert any(load_study(file).measures.removal_images for file in CONFIGS)


def can_be_run(experiment: ExperimentConfig) -> bool:
    ranks = (experiment.lora and experiment.lora.ranks) or (experiment.qa_lora and experiment.qa_lora.ranks)
    return ranks is None or ranks.rule not in FORMER_RULES


@cache
def runnable(file: Path) -> StudyConfig:
    """Return a study without the experiments that no version makes any more."""
    study = load_study(file)
    return study.model_copy(update={"experiments": tuple(filter(can_be_run, study.experiments))})


@cache
def planned(file: Path) -> Plan:
    study = runnable(file)
    plan = plan_study(study, Path("/nothing/is/done/here"), file=file, smoke=True)
    assert [run.spec.experiment.name for run in plan.pending] == [e.name for e in study.experiments]
    return plan


@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_it_plans(file: Path) -> None:
    assert planned(file).runs


def test_a_study_of_a_rule_that_is_gone_loads_and_is_not_run() -> None:
    file = EXPERIMENTS / "ranks" / "configs" / "frontier_digits_9.yaml"
    with pytest.raises(UserError, match="use stable_rank or even") as refused:
        plan_study(load_study(file), Path("/nothing/is/done/here"), file=file, smoke=True)
    assert refused.value.field == "experiments[1].lora.ranks.rule"


def ways(value: object, path: tuple[str, ...] = ()) -> set[tuple[object, ...]]:
    """Return each setting with its value; all numbers are alike, since another rank takes no other way."""
    if isinstance(value, dict):
        return set().union(*(ways(one, (*path, key)) for key, one in value.items()))
    if isinstance(value, list):
        return {(*path, str([one if isinstance(one, str) else "a number" for one in value]))}
    return {(*path, value if isinstance(value, str | bool | None) else "a number")}


def ways_of(study: StudyConfig) -> list[set[tuple[object, ...]]]:
    """Return what the smoke run of each experiment tries: its method's settings, the backbone, images and measures."""
    small = smoke_study(study, patch_size=16)  # of the backbone's own, which follows from its name
    around = ways(small.model_dump(mode="json", include={"data", "measures", "precision"}))
    around |= {("model", small.backbone.model)}
    methods = [one.model_dump(mode="json", exclude={"name"}) for one in small.experiments]
    changes = [{"augmentation": one["training"].pop("augmentation")} for one in methods]  # the same for any method
    return [around | ways(change) | ways(one, (one["method"],)) for change, one in zip(changes, methods, strict=True)]


def chosen() -> list[tuple[Path, int, bool]]:
    """Choose few experiments that try all there is to try: file, place, and whether its method is met anew."""
    studies = {file: runnable(file) for file in CONFIGS}
    tried = {(file, place): one for file, study in studies.items() for place, one in enumerate(ways_of(study))}
    left = set().union(*tried.values())
    found, methods = [], set()
    while left:
        file, place = max(tried, key=lambda each: len(tried[each] & left))
        left -= tried[file, place]
        method = studies[file].experiments[place].method
        found.append((file, place, method not in methods))
        methods.add(method)
    return found


@pytest.mark.part("runner")
@pytest.mark.parametrize(
    ("file", "place"),
    [
        pytest.param(file, place, id=f"{file.stem}-{place}", marks=() if anew else pytest.mark.slow)
        for file, place, anew in chosen()
    ],
)
def test_smoke(file: Path, place: int, tmp_path: Path) -> None:
    check_smoke_run(planned(file).runs[place].spec, tmp_path)
