"""What stood written down when a run's first attempt began is in its record, whatever carries it out and resumes it."""

import hashlib
from pathlib import Path

import pytest

from peft_vit.analysis import hypotheses
from peft_vit.errors import UserError
from peft_vit.records import Registration
from peft_vit.records.study_file import read_study_file
from peft_vit.runs import run_one
from peft_vit.studies import plan_study
from peft_vit.studies.study_file import go_on, study_file, write_study_file
from peft_vit.training import Checkpoints, Interrupted

pytestmark = pytest.mark.part("runner")

OWN = """
hypotheses:
  - id: own-sentence
    sentence: LoRA is more accurate than a linear probe
    measure: difference
    parameters: {of: {methods: [lora]}, against: {methods: [linear]}, quantity: test_accuracy, better: higher}
    unit: share
    test: superiority
    family: own
    refuted_by: it is less accurate
    source: me
"""


def plan_of(study, folder: Path, own: str | None = None):
    config = study("lora")
    if own is not None:
        (folder / "own.yaml").write_text(own)
        config = config.model_copy(update={"hypotheses": "own.yaml"})
    return plan_study(config, folder / "results", file=folder / "tiny.yaml")


def test_a_plan_reads_the_packaged_registry_and_the_own_one(study, tmp_path) -> None:
    packaged = hypotheses.PACKAGED.read_bytes()
    (plain,) = plan_of(study, tmp_path).runs
    (with_own,) = plan_of(study, tmp_path, OWN).runs
    assert plain.registration.sha256 == hashlib.sha256(packaged).hexdigest()
    assert with_own.registration.sha256 == hashlib.sha256(packaged + OWN.encode()).hexdigest()
    assert with_own.registration.hypotheses.keys() - plain.registration.hypotheses.keys() == {"own-sentence"}
    assert with_own.spec == plain.spec, "hypotheses are no part of a run"


def test_a_plan_names_the_fault_of_an_own_registry(study, tmp_path) -> None:
    with pytest.raises(UserError, match=r"own\.yaml:9: hypotheses\[0\]\.famly: unknown key here"):
        plan_of(study, tmp_path, OWN.replace("family: own", "famly: own"))
    with pytest.raises(UserError, match="is no file"):
        plan_study(study("linear").model_copy(update={"hypotheses": "absent.yaml"}), tmp_path, file=tmp_path / "t.yaml")


def test_a_record_says_what_it_was_handed_or_what_comes_along(study, tmp_path) -> None:
    (planned,) = plan_of(study, tmp_path, OWN).runs
    record = run_one(planned.spec, registration=planned.registration).record
    assert record.status == "done"
    assert record.registration == planned.registration
    assert run_one(planned.spec).record.registration == plan_of(study, tmp_path).runs[0].registration


def test_a_resumed_run_keeps_what_stood_there_at_its_first_attempt(study, tmp_path) -> None:
    (planned,) = plan_of(study, tmp_path).runs
    told: list[int] = []
    with pytest.raises(Interrupted):
        run_one(
            planned.spec,
            checkpoints=Checkpoints(tmp_path / "run", 0),
            should_stop=lambda: 2 in told,
            on_progress=lambda progress: told.append(progress.step),
            registration=planned.registration,
        )
    later = Registration(sha256="1" * 64, hypotheses={"afterthought": "2" * 64})
    record = run_one(planned.spec, checkpoints=Checkpoints(tmp_path / "run", 0), registration=later).record
    assert record.status == "done"
    assert record.registration == planned.registration


def test_a_failed_run_has_it_too(study, tmp_path) -> None:
    (planned,) = plan_of(study, tmp_path).runs
    spec = planned.spec.model_copy(update={"data": planned.spec.data.model_copy(update={"path": "/nowhere"})})
    record = run_one(spec, registration=planned.registration).record
    assert record.status == "failed"
    assert record.registration == planned.registration


def test_adding_hypotheses_makes_no_other_study(study, tmp_path) -> None:
    folder = tmp_path / "tiny"
    folder.mkdir()
    before = study_file(study("linear"), (), smoke=False, data_sha256="0" * 64)
    write_study_file(folder, before)
    config = study("linear").model_copy(update={"hypotheses": "own.yaml"})
    asked = study_file(config, (), smoke=False, data_sha256="0" * 64)
    assert (
        go_on(folder, read_study_file(folder), asked, source=tmp_path / "tiny.yaml").configuration.hypotheses
        == "own.yaml"
    )
