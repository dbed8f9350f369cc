"""What stood written down when a run was first begun is in its record, whatever carries it out and resumes it."""

import hashlib
from pathlib import Path

import pytest
from fake_study import FakeExecutor, fake_config, fake_drive

from peft_vit.analysis import hypotheses
from peft_vit.errors import UserError
from peft_vit.records import Registration, read_records
from peft_vit.records.study_file import read_study_file
from peft_vit.studies.events import RunStarted
from peft_vit.studies.plan import plan_study
from peft_vit.studies.study_file import go_on, study_file, write_study_file

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
    plain, with_own = plan_of(study, tmp_path), plan_of(study, tmp_path, OWN)
    assert plain.registration.sha256 == hashlib.sha256(packaged).hexdigest()
    assert with_own.registration.sha256 == hashlib.sha256(packaged + OWN.encode()).hexdigest()
    assert with_own.registration.hypotheses.keys() - plain.registration.hypotheses.keys() == {"own-sentence"}
    assert with_own.runs[0].spec == plain.runs[0].spec, "hypotheses are no part of a run"


def test_a_plan_names_the_fault_of_an_own_registry(study, tmp_path) -> None:
    with pytest.raises(UserError, match=r"own\.yaml:9: hypotheses\[0\]\.famly: unknown key here"):
        plan_of(study, tmp_path, OWN.replace("family: own", "famly: own"))
    with pytest.raises(UserError, match="is no file"):
        plan_study(study("linear").model_copy(update={"hypotheses": "absent.yaml"}), tmp_path, file=tmp_path / "t.yaml")


def registered(out) -> dict[str, tuple[str, Registration | None]]:
    return {record.spec.experiment.name: (record.status, record.registration) for record in read_records(out)}


def test_a_record_has_what_stood_there_at_the_first_attempt_also_of_a_failed_or_resumed_run(tmp_path) -> None:
    def stop_at_b(event) -> None:
        if isinstance(event, RunStarted) and event.run.spec.experiment.name == "b":
            raise KeyboardInterrupt

    first, later = (Registration(sha256=digit * 64, hypotheses={f"h{digit}": "0" * 64}) for digit in "12")
    study = fake_config(("a", "b", "c"), (0,))
    with pytest.raises(KeyboardInterrupt):
        fake_drive(study, tmp_path, FakeExecutor({"a/seed_0": ["diverged"]}), stop_at_b, registration=first)
    assert registered(tmp_path) == {"a": ("failed", first)}
    fake_drive(study, tmp_path, registration=later)
    assert registered(tmp_path) == {"a": ("done", first), "b": ("done", first), "c": ("done", later)}
    names = {file.name for file in (tmp_path / "fake").rglob("*") if file.is_file()}
    assert names == {"study.json", "record.json", "adapter.safetensors"}


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
