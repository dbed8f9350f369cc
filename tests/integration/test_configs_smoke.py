"""Every configuration in the repository loads and plans; few of their experiments do smoke runs, at real width.

They are chosen so that each value of each setting of each method, each backbone, kind of images and measure is tried.
"""

from functools import cache
from pathlib import Path

import pytest
from written_runs import run_and_write

from peft_vit.adapters import current_ranks, load_trained
from peft_vit.backbones import load_backbone
from peft_vit.config import METHOD_KINDS, PROBE_L2, StudyConfig, load_study
from peft_vit.evaluation import trainable_parameters
from peft_vit.records import ADAPTER_FILE, RunRecord, read_record, run_folder
from peft_vit.runs.restore import prepare_as_saved
from peft_vit.studies.plan import Plan, plan_study
from peft_vit.studies.smoke import smoke_study

_FILES = sorted((Path(__file__).parents[2] / "experiments" / "configs").glob("*.yaml"))
CONFIGS = [file for file in _FILES if not file.name.startswith("hypotheses")]  # the others are studies
pytestmark = pytest.mark.usefixtures("cache")


@pytest.mark.part("configuration")
def test_the_promised_configurations_are_there() -> None:
    names = {file.stem for file in CONFIGS}
    assert names >= {
        "quickstart",
        "adalora_comprehensive_experiment",
        "qa_lora_comprehensive_experiment",
        "fixed_rank_baselines",
        "cifar100_vit_small",
        "tiny_imagenet_deit_small",
    }


@pytest.mark.part("importance analysis")
def test_one_of_them_measures_what_updates_are_worth() -> None:
    assert any(load_study(file).measures.removal_images for file in CONFIGS)


@cache
def planned(file: Path) -> Plan:
    study = load_study(file)
    plan = plan_study(study, Path("/nothing/is/done/here"), file=file, smoke=True)
    assert [run.spec.experiment.name for run in plan.pending] == [e.name for e in study.experiments]
    return plan


@pytest.mark.parametrize("file", CONFIGS, ids=[file.stem for file in CONFIGS])
def test_it_plans(file: Path) -> None:
    assert planned(file).runs


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
    studies = {file: load_study(file) for file in CONFIGS}
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
    record = run_and_write(planned(file).runs[place].spec, tmp_path)
    assert (record.status, record.error) == ("done", None)
    assert record == read_record(run_folder(tmp_path, record.spec) / "record.json")
    check_record(record)
    if record.spec.experiment.method in ("adalora", "qa_lora", "qa_adalora"):  # fixed ranks: test_runs_execute.py
        check_saved_adapter(record, tmp_path)


def check_record(record: RunRecord) -> None:
    """Check what every record must hold, and that it says what it is."""
    assert record.spec.smoke
    assert record.provenance.random_weights
    assert record.provenance.weights_sha256 is None
    assert "random" in record.provenance.weights_name
    assert len(record.steps) == (len(PROBE_L2) if record.spec.experiment.is_probe else 8)
    assert record.validation == next(e.metrics for e in record.evaluations if e.step == record.chosen_step)
    assert next(e for e in record.evaluations if e.step == record.chosen_step).deployable
    assert record.test.n == record.split_sizes["test"]
    measures = record.spec.measures
    assert tuple(record.latency_s) == measures.latency_batches
    has_updates = record.spec.experiment.has_adapters
    assert (record.removal is not None) == (has_updates and measures.removal_images is not None)
    if record.removal is not None:  # more images are asked for than the 8 that a smoke run has
        assert record.removal.images == record.split_sizes["validation"]
        last = record.rank_history[-1].ranks
        assert record.removal.site_loss_rise.keys() == {name for name, rank in last.items() if rank}
    binary = len(record.class_names) == 2
    assert (record.test.auroc is not None) == binary
    method, parameters = record.spec.experiment.method, record.parameters
    if method in ("adalora", "qa_adalora"):
        adalora = record.spec.experiment.adalora
        budget = adalora.budget
        assert [entry.step for entry in record.importance_history] == list(range(1, 9 - adalora.final_steps))
        assert {entry.unit for entry in record.rank_history} == {budget.unit}
        assert all(entry.spent <= entry.budget for entry in record.rank_history)
        assert record.rank_history[-1].budget == budget.total
        if budget.unit == "ranks":
            assert sum(record.rank_history[-1].ranks.values()) == budget.total
        assert parameters.peak >= parameters.initial
    else:
        assert parameters.initial == parameters.final == parameters.peak
    assert (
        (record.quantization is not None)
        == (method in ("qa_linear", "qa_lora", "qa_adalora"))
        == bool(record.bits_history)
    )
    # Before the first step no site has a rank where ranks are adaptive: the head alone is what is chosen there.
    head_alone = METHOD_KINDS[method].trains == "head" or (record.chosen_step == 0 and "adalora" in method)
    assert (parameters.final == parameters.head) == head_alone
    if method == "full":
        assert parameters.final == parameters.head + parameters.backbone_total
        assert record.bytes.frozen_bytes == 0
    assert record.bytes.trainable_bytes == 4 * parameters.final
    assert 4 * parameters.final < record.bytes.adapter_file_bytes < 4 * parameters.final + 50_000
    qa_lora = record.spec.experiment.qa_lora
    if qa_lora is not None and qa_lora.adaptive_bits is None:
        bits = qa_lora.quantization_bits
        per_group = 32 / qa_lora.group_size  # bits of scale and offset, shared; without groups far less
        assert bits < record.quantization.bits_per_weight <= bits + per_group
    if qa_lora is not None and qa_lora.adaptive_bits is not None:
        assert record.bit_allocation.spent_bytes <= record.bit_allocation.budget_bytes


def check_saved_adapter(record: RunRecord, results_dir: Path) -> None:
    """Check that the file fits a fresh model, whose live counts are the recorded ones."""
    spec = record.spec
    fresh = load_backbone(
        spec.backbone, image_size=spec.data.image_size, num_classes=len(record.class_names), seed=9, smoke=True
    ).model
    file = run_folder(results_dir, spec) / ADAPTER_FILE
    prepare_as_saved(fresh, spec.experiment, file, total_steps=8, seed=9)
    metadata = load_trained(fresh, file)
    ranks = record.rank_history[-1].ranks if record.rank_history else {}
    if record.chosen_step == 0 and "adalora" in spec.experiment.method:
        ranks = dict.fromkeys(ranks, 0)
    assert metadata["ranks"] == current_ranks(fresh) == ranks
    assert trainable_parameters(fresh) == record.parameters.final
    assert metadata["class_names"] == record.class_names
