"""A record is read as it was written, or refused in one line; a spec's digest covers everything in it."""

import errno
import json
import os
import re
import tarfile
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import planted
import pytest
from pydantic import BaseModel

from peft_vit.base.errors import UserError
from peft_vit.base.files import flush, write_atomically
from peft_vit.core.config import AdaLoraConfig, LoraConfig, QaLoraConfig, StudyConfig, load_study
from peft_vit.core.records import ImportanceEntry, Metrics, RankEntry, RunRecord, RunSpec
from peft_vit.runs.records.run_rows import outcome_digest
from peft_vit.runs.records.scan import read_records
from peft_vit.runs.records.storage import ADAPTER_FILE, RECORD_FILE, read_record, write_record, write_result

EXAMPLES = Path(__file__).parents[2] / "examples"
KEPT = Path(__file__).with_name("kept_records.tar.xz")  # of finished studies, one of each kind below


def study() -> StudyConfig:
    return load_study(EXAMPLES / "quickstart.yaml")


def spec(experiment: str = "qa_lora_fp4_cosine", seed: int = 1) -> RunSpec:
    config = study()
    (chosen,) = (own for own in config.experiments if own.name == experiment)
    own = config.model_dump(include={"backbone", "data", "device", "threads"})
    return RunSpec(study=config.name, seed=seed, experiment=chosen, precision="bf16", **own)


def record(of: RunSpec) -> RunRecord:
    """Return a record with every field filled; the numbers are arbitrary but not round."""
    metrics = Metrics(n=7, accuracy=5 / 7, balanced_accuracy=0.1 + 0.2, auroc=None, nll=1e-17, ece=1 / 3)
    made = planted.record(planted.experiments()["qa_lora_4bit_nf4_constant"], of.seed, 0.7)
    site = made.sites[0].name
    entries = [
        RankEntry(step=0, budget=6000, ranks={site: 8}, unit="parameters"),
        RankEntry(step=1, budget=None, ranks={site: 0}, unit="parameters"),
        RankEntry(step=2, budget=800, ranks={site: 1}, unit="parameters", cost=768),
    ]
    changes = {
        "spec": of,
        "spec_digest": of.digest(),
        "provenance": planted.provenance(1, processor="some \u00b5 processor", git_hash=None, git_dirty=None),
        "sites": made.sites[:1],
        "steps": [made.steps[0].model_copy(update={"penalties": {"p": 0.1}})],
        "rank_history": entries,
        "importance_history": [ImportanceEntry(step=1, scores={site: 0.3})],
        "validation": metrics,
        "test": metrics,
    }
    return made.model_copy(update=changes)


@pytest.mark.parametrize("experiment", [experiment.name for experiment in study().experiments])
def test_a_record_is_read_as_it_was_written(experiment, tmp_path) -> None:
    written = record(spec(experiment))
    file = write_record(tmp_path, written)
    assert file == tmp_path / "quickstart" / experiment / "seed_1" / RECORD_FILE
    read = read_record(file)
    assert read == written
    assert read.spec.digest() == written.spec_digest
    assert file.stat().st_mode & 0o777 == 0o644


def test_budgets_of_older_records_are_counted_in_ranks() -> None:
    older = RankEntry(step=0, budget=6000, ranks={"one": 8, "other": 1})
    assert (older.unit, older.spent) == ("ranks", 9)


def test_records_come_in_the_order_of_their_paths_failed_ones_too(tmp_path) -> None:
    for experiment, seed in (("lora_r2", 1), ("lora_r1", 1)):
        write_record(tmp_path, record(spec(experiment, seed)))
    of = spec("lora_r1", 0)
    ended = {"error": "loss is not finite", "traceback": "a\nb", "started_at": "2025-01-01T00:00:00Z", "seconds": 0.5}
    written = RunRecord(spec=of, spec_digest=of.digest(), status="failed", **ended)
    assert read_record(write_record(tmp_path, written)) == written
    names = [read.spec.name for read in read_records(tmp_path)]
    assert names == ["lora_r1/seed_0", "lora_r1/seed_1", "lora_r2/seed_1"]


NO_RECORDS = [
    b"",
    b"{'a': 1}",
    b"\xff\xfe\x00",
    b"[]",
    b"{}",
    b'{"schema_version": 2}',
    b'{"schema_version": "1"}',
    b'{"schema_version": 1}',
    b'{"schema_version": 1, "spec": {',
    b'{"schema_version": 1, "error": "\\ud800"}',  # half a character
    b'{"schema_version": 1, "\\uDC00": 1}',
    b'{"schema_version": 1, "error": "\\ud83d\\ude00"}',  # a whole one
    b"[" * 100_000,
    b'{"schema_version": 1, "spec": ' + b'{"a":' * 100_000,
    b'{"schema_version": ' + b"9" * 9_999,
]


@pytest.mark.parametrize("content", NO_RECORDS, ids=range(len(NO_RECORDS)))
def test_what_is_no_record_is_refused_in_one_line_with_its_remedy(content, tmp_path) -> None:
    file = tmp_path / RECORD_FILE
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"move it away and run the study again$") as caught:
        read_record(file)
    assert caught.value.file == str(file)
    assert len(str(caught.value).splitlines()) == 1


WRONG: list[tuple[str, object]] = [
    ("seconds", "long"),
    ("status", "perhaps"),
    ("sites.0.matrix", "<b>"),
    ("sites.0.role", "head"),
    ("spec.experiment.qa_lora.rank", 0),
    ("spec.threads", None),
    ("invented", 1),
    ("steps.0.invented", 1),
    ("test.ece", float("nan")),
    ("test.accuracy", -1),
    ("validation.n", 0),
    ("majority_accuracy.test", float("inf")),
    ("majority_accuracy.test", 1e308),
    ("parameters.final", 10**30),
    ("bytes.frozen_bytes", -1),
    ("seconds_per_step", float("inf")),
    ("seconds_per_step", -0.5),
    ("overhead_s.scoring", float("nan")),
    ("latency_s.1", float("inf")),
    ("peak_memory_bytes", -1),
    ("steps", 2 * [{"step": 1, "loss": 0.7, "learning_rate": 1e-3, "gradient_norm": 2, "seconds": 0.1}]),
    ("rank_history", 2 * [{"step": 0, "budget": 1, "ranks": {}}]),
    ("rank_history", [{"step": 0, "budget": 1, "ranks": {}}, {"step": 1, "budget": 1, "ranks": {}, "unit": "bytes"}]),
    # names that lead out of the results directory
    *(("spec.study", name) for name in ("../../etc", "/etc", "", "a" * 300, "Study")),
    *(("spec.experiment.name", name) for name in ("..", "a\0")),
    *(("spec.seed", seed) for seed in (-1, 10**4000)),
]


@pytest.mark.parametrize(("field", "value"), WRONG, ids=range(len(WRONG)))
def test_a_wrong_value_is_named_by_its_field(field, value, tmp_path) -> None:
    file = write_record(tmp_path, record(spec()))
    data = json.loads(file.read_text())
    *sections, last = (int(part) if part == "0" else part for part in field.split("."))
    node: Any = data
    for part in sections:
        node = node[part]
    node[last] = value
    file.write_text(json.dumps(data))
    with pytest.raises(UserError) as caught:
        read_record(file)
    assert caught.value.field == field


@pytest.mark.parametrize("failing", ["replace", "fsync"])
def test_a_failed_write_leaves_the_old_file_and_no_other(failing, tmp_path, monkeypatch) -> None:
    file = tmp_path / "record.json"

    def fail(*_: object) -> None:
        raise OSError("disk full")

    for content, broken in ((b"old", False), (b"new", True), (b"new", False)):
        with monkeypatch.context() as patched:
            if broken:
                patched.setattr(os, failing, fail)
            with pytest.raises(OSError, match="disk full") if broken else nullcontext():
                write_atomically(file, content)
        assert file.read_bytes() == (b"old" if broken else content)
        assert list(tmp_path.iterdir()) == [file]


def test_new_folders_outlast_a_power_failure(tmp_path, monkeypatch) -> None:
    """Each name is flushed to disk with the folder that holds it."""
    flushed: list[int] = []
    fsync = os.fsync
    monkeypatch.setattr(
        os, "fsync", lambda descriptor: (flushed.append(os.fstat(descriptor).st_ino), fsync(descriptor))
    )
    file = tmp_path / "results" / "study" / "file"
    write_atomically(file, b"new")
    assert set(flushed) == {path.stat().st_ino for path in (tmp_path, *file.parents[:2], file)}
    assert flushed[-1] == file.parent.stat().st_ino  # last, when the file has its name


def leaves(value: BaseModel, prefix: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    """Return the paths of all fields that hold no model."""
    paths: list[tuple[str, ...]] = []
    for name in type(value).model_fields:
        inner = getattr(value, name)
        paths += leaves(inner, (*prefix, name)) if isinstance(inner, BaseModel) else [(*prefix, name)]
    return paths


def with_other(value: BaseModel, path: tuple[str, ...]) -> BaseModel:
    """Return a copy in which one field differs; unchecked, because only the digest is asked here."""
    inner = getattr(value, path[0])
    other = with_other(inner, path[1:]) if len(path) > 1 else f"other than {inner!r}"
    return value.model_copy(update={path[0]: other})


@pytest.mark.parametrize(
    ("study", "experiment", "flips", "outcome"),
    [
        ("study_elpv", "lora", "horizontal", "5fd63c38"),
        ("study_elpv", "linear", "horizontal", "5a8524e1"),
        ("study_elpv", "adalora", "horizontal", "e012974b"),
        ("study_elpv", "qa_", "horizontal", "46e26699"),
        ("study_digits", "lora", "none", "c120f401"),
    ],
)
def test_the_digests_of_a_kept_run_are_what_they_were(study, experiment, flips, outcome, tmp_path) -> None:
    """Or a finished study would be done again."""
    with tarfile.open(KEPT) as kept:
        for member in kept:
            if re.search(rf"^{study}/{experiment}[^/]*/seed_\d+/record\.json$", member.name):
                (tmp_path / "record.json").write_bytes(kept.extractfile(member).read())
                read = read_record(tmp_path / "record.json")
                assert read.spec.digest() == read.spec_digest
                assert outcome_digest(read).startswith(outcome)
                assert read.spec.experiment.training.flips == flips
                return
    pytest.fail("no such run among the kept ones")


def test_a_field_that_records_get_is_part_of_an_outcome_unless_it_is_named() -> None:
    class Later(RunRecord):
        found: int

    own = dict(record(spec()))
    one, other = (outcome_digest(Later(**own, found=found)) for found in (1, 2))
    assert one != other
    assert one == outcome_digest(Later(**own | {"seconds": own["seconds"] + 1}, found=1))


@pytest.mark.filterwarnings("ignore:Pydantic serializer warnings")
@pytest.mark.parametrize("experiment", ["linear_probe", "lora_r1", "adalora_top_k_fisher", "qa_lora_int8_linear"])
def test_digest_changes_with_each_field(experiment) -> None:
    base = spec(experiment)
    paths = leaves(base)
    section: dict[str, type[BaseModel]] = {
        "lora_r1": LoraConfig,
        "adalora_top_k_fisher": AdaLoraConfig,
        "qa_lora_int8_linear": QaLoraConfig,
    }
    if experiment in section:
        assert {path[-1] for path in paths} >= set(section[experiment].model_fields)
    digests = [base.digest()]
    for path in paths:
        changed = with_other(base, path)
        assert isinstance(changed, RunSpec)
        digests.append(changed.digest())
    assert len(set(digests)) == len(paths) + 1
    assert spec(experiment).digest() == base.digest()


def test_a_link_in_place_of_a_record_is_replaced_and_not_followed(tmp_path) -> None:
    folder = tmp_path / "results" / spec().run_id
    folder.mkdir(parents=True)
    for name in (RECORD_FILE, ADAPTER_FILE):
        (tmp_path / name).write_text("mine")
        (folder / name).symlink_to(tmp_path / name)
    write_result(tmp_path / "results", record(spec()), b"adapter")
    assert [(tmp_path / name).read_text() for name in (RECORD_FILE, ADAPTER_FILE)] == ["mine", "mine"]
    assert not (folder / RECORD_FILE).is_symlink()
    assert (folder / ADAPTER_FILE).read_bytes() == b"adapter"


def test_a_folder_without_records_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"holds no record\.json; run a study first"):
        list(read_records(tmp_path))


def test_a_file_system_that_flushes_no_folder_is_no_fault(tmp_path, monkeypatch) -> None:
    def refuse(descriptor: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    (tmp_path / "here").write_bytes(b"1")
    monkeypatch.setattr(os, "fsync", refuse)
    flush(tmp_path)
    with pytest.raises(OSError, match="Invalid argument"):
        flush(tmp_path / "here")
