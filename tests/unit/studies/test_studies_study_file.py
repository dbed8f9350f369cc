"""A study goes on with the configuration that it was begun with; what may be added is added."""

import json

import pytest
from fake_study import done_record, failed_record, fake_config, fake_plan
from golden import check_golden

from peft_vit.base.errors import UserError
from peft_vit.core.records import StudyFile
from peft_vit.runs.records.storage import RECORD_FILE, STUDY_FILE, read_study_file, write_study_file
from peft_vit.runs.scheduling.scheduler import go_on, study_file

pytestmark = pytest.mark.part("runner")


def requested(config, runs=None, *, smoke=False, data="d") -> StudyFile:
    every = {f"{experiment.name}/seed_{seed}" for experiment in config.experiments for seed in config.seeds}
    return study_file(config, every if runs is None else runs, smoke=smoke, data_sha256=data)


def with_rank(config, name, rank):
    changed = [
        own.model_copy(update={"lora": own.lora.model_copy(update={"rank": rank})}) if own.name == name else own
        for own in config.experiments
    ]
    return config.model_copy(update={"experiments": tuple(changed)})


@pytest.fixture
def begun(tmp_path):
    """Return a folder in which a study of a and b, seeds 0 and 1, was begun."""
    write_study_file(tmp_path, requested(fake_config(("a", "b"), (0, 1))))
    return tmp_path


def test_it_is_read_as_it_was_written(tmp_path) -> None:
    assert read_study_file(tmp_path) is None
    content = requested(fake_config(("a", "b"), (3, 1), execution={"workers": 4}), {"a/seed_3", "b/seed_1"})
    assert content.runs == ("a/seed_3", "a/seed_1", "b/seed_3", "b/seed_1")
    assert content.skipped == ("a/seed_1", "b/seed_3")
    write_study_file(tmp_path, content)
    assert read_study_file(tmp_path) == content


def goes_on(folder, config, runs=None, *, part=False, **other) -> StudyFile:
    """Return what study.json would say once a command has asked for more."""
    return go_on(folder, read_study_file(folder), requested(config, runs, **other), source="s.yaml", part=part)


def test_what_may_be_added_and_what_may_change(begun) -> None:
    more = fake_config(("c", "b", "a"), (2, 1, 0))
    content = goes_on(begun, more)
    assert content.configuration == more
    assert set(content.runs) == {f"{name}/seed_{seed}" for name in "abc" for seed in range(3)}
    assert content.skipped == ()
    other = fake_config(("a", "b"), (0, 1), execution={"workers": 7, "retries": 0}, description="other words")
    assert goes_on(begun, other).configuration == other


def test_runs_that_a_command_leaves_out_are_skipped_until_one_asks_for_them(begun) -> None:
    config = fake_config(("a", "b"), (0, 1))
    for runs, skipped in (
        ({"a/seed_0"}, ("a/seed_1", "b/seed_0", "b/seed_1")),
        ({"b/seed_0", "b/seed_1"}, ("a/seed_0", "a/seed_1")),
    ):
        write_study_file(begun, goes_on(begun, config, runs))
        assert read_study_file(begun).skipped == skipped


def test_a_change_is_refused_with_the_difference(begun) -> None:
    config = fake_config(("a", "b"), (0, 1))
    before = (begun / STUDY_FILE).read_bytes()
    document = []
    for what, changed in (
        ("another rank", with_rank(config, "b", 3)),
        ("other threads", config.model_copy(update={"threads": 1})),
        ("a seed less", config.model_copy(update={"seeds": (1, 5)})),
        ("an experiment less", config.model_copy(update={"experiments": config.experiments[:1]})),
        ("a setting more", config.model_copy(update={"data": config.data.model_copy(update={"train_images": 9})})),
        ("another study of the same name", fake_config(("x",), (0, 1))),
    ):
        with pytest.raises(UserError) as caught:
            goes_on(begun, changed)
        document += [f"# {what}", str(caught.value), caught.value.details]
    assert (begun / STUDY_FILE).read_bytes() == before
    check_golden("study_differences.txt", "\n".join(document).replace(str(begun), "DIR") + "\n")


@pytest.mark.parametrize(("other", "field"), [({"data": "e"}, "data_sha256"), ({"smoke": True}, "smoke")])
def test_other_images_and_smoke_are_other_studies(begun, other, field) -> None:
    with pytest.raises(UserError) as caught:
        goes_on(begun, fake_config(("a", "b"), (0, 1)), **other)
    assert (caught.value.file, caught.value.field) == (str(begun / STUDY_FILE), field)


def test_a_part_adds_its_runs_and_leaves_the_others(begun) -> None:
    part = fake_config(("b", "c"), (1, 4))
    content = goes_on(begun, part, part=True)
    assert [experiment.name for experiment in content.configuration.experiments] == ["a", "b", "c"]
    assert content.configuration.seeds == (0, 1, 4)
    assert set(content.runs) - set(content.skipped) == {"b/seed_1", "b/seed_4", "c/seed_1", "c/seed_4"}
    assert content.skipped == ("a/seed_0", "a/seed_1", "b/seed_0")
    with pytest.raises(UserError, match="another configuration"):
        goes_on(begun, with_rank(part, "b", 3), part=True)
    assert goes_on(begun, with_rank(part, "c", 3), part=True).configuration.experiments[2].lora.rank == 3


def test_a_file_that_was_changed_names_itself_and_its_field(begun) -> None:
    file = begun / STUDY_FILE
    whole = json.loads(file.read_text())
    for change, said in (
        ({"runs": ["a/seed_0", "../b/seed_0"]}, r"runs\.1: .*pattern"),
        ({"data_sha256": None}, "data_sha256"),
        ({"other": 1}, "other"),
        ({"schema_version": 2}, "schema_version"),
        ({"configuration": whole["configuration"] | {"threads": "many"}}, r"configuration\.threads"),
    ):
        file.write_text(json.dumps(whole | change))
        with pytest.raises(UserError, match=rf"study\.json: {said}.*; move it away and give the command"):
            read_study_file(begun)
    for content in (b"", b"{", b"\xff", b"[" * 100_000, b"null"):
        file.write_bytes(content)
        with pytest.raises(UserError, match=r"study\.json: .*move it away"):
            read_study_file(begun)


def after(folder, seeds, part, record=None, names="abc") -> tuple[int, ...]:
    """Return the added seeds that study.json names once a command has asked for more, beside a record of a/seed_0."""
    if record is not None:
        file = folder / "a" / "seed_0" / RECORD_FILE
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(record.model_dump_json())
    write_study_file(folder, goes_on(folder, fake_config(names, seeds), part=part))
    return read_study_file(folder).seeds_added


@pytest.mark.parametrize("part", [False, True])
def test_seeds_that_are_added_after_results_are_remembered(begun, part) -> None:
    spec = fake_plan(fake_config(("a",), (0,)), begun).runs[0].spec
    assert after(begun, (0, 1, 2), part, names="ab") == ()
    assert after(begun, (0, 1, 2, 3), part, failed_record(spec, "killed"), names="ab") == ()
    assert after(begun, (3, 1, 2, 0), part, done_record(spec)) == ()
    assert after(begun, (0, 1, 2, 3, 7, 5), part) == (7, 5)
    assert after(begun, (0, 1, 2, 3, 5, 7), part) == (7, 5)
    assert after(begun, (0, 1, 2, 3, 5, 7, 9), part) == (7, 5, 9)


LOOKS = {"stopping": {"control": "a", "asked": "superiority", "every": 2}}
OTHER_LEVEL = {"stopping": {**LOOKS["stopping"], "level": 0.1}}


@pytest.mark.parametrize(("before", "now"), [({}, LOOKS), (LOOKS, {}), (LOOKS, OTHER_LEVEL)])
def test_what_was_declared_of_looks_stays(tmp_path, before, now) -> None:
    first, second = (fake_config("ab", (0, 1), **settings) for settings in (before, now))
    write_study_file(tmp_path, requested(first))
    assert goes_on(tmp_path, first).seeds_added == ()
    with pytest.raises(UserError, match="was begun with another configuration"):
        goes_on(tmp_path, second)
