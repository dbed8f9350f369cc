"""From a folder to its folds and a last test: inspected, tested fold by fold, at the end on the holdout."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from written_runs import run_and_write, tiny_study

from peft_vit.core.config import StudyConfig, study_from_mapping
from peft_vit.core.records import RunSpec
from peft_vit.data import images_file, inspect_images, make_splits, open_index
from peft_vit.lab.analysis.comparison import compare
from peft_vit.lab.analysis.studies import load_studies
from peft_vit.lab.report.summary import facts
from peft_vit.runs.costs.timing_run import timing_run
from peft_vit.runs.scheduling.plan import plan_study, smoke_study, workload_of

pytestmark = pytest.mark.part("runner")


@pytest.fixture
def inspected(images: Path, tmp_path: Path) -> tuple[Path, Path]:
    """Return a copy of the shared folder with a damaged file and a brighter copy, and what was found there."""
    root = tmp_path / "images"
    shutil.copytree(images, root)
    (root / "class_0" / "damaged.png").write_bytes(b"\x89PNG\r\n\x1a\n")
    with Image.open(root / "class_1" / "00.png") as image:
        image.resize((60, 40)).save(root / "class_1" / "larger.png")
    file = tmp_path / "images.json"
    file.write_text(json.dumps(images_file(inspect_images(root), seed=1)))
    return root, file


def study_of(inspected: tuple[Path, Path], weights: Path, seeds: list[int], **data: object) -> StudyConfig:
    root, file = inspected
    probe = {"method": "linear", "training": {"probe_l2": 0.1}}
    mapping = tiny_study(
        seeds=seeds,
        backbone={"model": "test_vit", "weights": "file", "file": str(weights)},
        data={"dataset": "image-folder", "path": str(root), "images_file": str(file), "image_size": 32, **data},
        experiments=[
            {"name": "plain", **probe},
            {"name": "unflipped", **probe, "training": {"probe_l2": 0.1, "augmentation": []}},
        ],
    )
    return study_from_mapping(mapping, file=Path("tiny.yaml"))


def specs(study: StudyConfig, folder: Path) -> list[RunSpec]:
    return [planned.spec for planned in plan_study(study, folder, file=Path("tiny.yaml")).runs]


def test_two_seeds_test_every_image_once_and_the_last_run_the_holdout(inspected, weights, cache, tmp_path) -> None:
    study = study_of(inspected, weights, [0, 1], folds=2, validation_images=6)
    records = [run_and_write(spec, tmp_path / "folds") for spec in specs(study, tmp_path / "folds")]
    assert [record.error for record in records] == [None] * 4
    index = open_index(study.data)
    assert index.official_test is not None
    assert index.names is not None
    assert "class_0/damaged.png" not in index.names
    tested: dict[str, list[int]] = {}
    hashes: dict[int, set[str]] = {}
    for record in records:
        assert record.predictions is not None
        assert record.provenance is not None
        tested.setdefault(record.spec.experiment.name, []).extend(record.predictions.images)
        hashes.setdefault(record.spec.seed, set()).add(record.provenance.split_sha256)
    outside = np.flatnonzero(~index.official_test).tolist()
    assert {name: sorted(images) for name, images in tested.items()} == dict.fromkeys(("plain", "unflipped"), outside)
    assert [len(of_seed) for of_seed in hashes.values()] == [1, 1]
    assert len(set.union(*hashes.values())) == 2

    (study,) = load_studies(tmp_path / "folds")
    assert study.images_tested_by_seed
    compared = compare(study.runs_of("plain"), study.runs_of("unflipped"), "plain", "unflipped")
    assert list(compared.by_seed) == [0, 1]
    assert any("each seed tests one of 2 folds" in said for _, said in facts(study))

    final = study_of(inspected, weights, [0], validation_images=0)
    record = run_and_write(specs(final, tmp_path / "final")[0], tmp_path / "final")
    assert record.predictions is not None
    assert record.predictions.images == np.flatnonzero(index.official_test).tolist()
    assert record.split_sizes == {"train": len(outside), "validation": 0, "test": index.official_test.sum()}


def test_what_stands_for_a_run_in_a_plan_reads_no_image_of_the_holdout(inspected, weights, cache) -> None:
    for validated in (0, 6):
        study = study_of(inspected, weights, [4], folds=3, validation_images=validated)
        index = open_index(study.data)
        splits = make_splits(index, study.data, 4)
        spec = specs(study, Path("nowhere"))[0]
        small = timing_run(spec, 1, workload_of(study, index, splits).shape, index, splits)
        again = RunSpec.model_validate_json(small.model_dump_json())  # as a worker reads it
        drawn = make_splits(index, again.data, 0)
        assert index.official_test is not None
        assert not index.official_test[np.concatenate([drawn.train, drawn.validation, drawn.test])].any()
        assert len(drawn.validation) >= 2  # how long an image takes to evaluate is measured on these
        smoke = smoke_study(study, 16)
        assert (smoke.data.images_file, smoke.data.validation_images > 0) == (None, validated > 0)
        StudyConfig.model_validate_json(smoke.model_dump_json())
