"""A study goes on with the configuration that it was begun with; what may be added is added."""

import json

import pytest
import yaml
from fake_study import done_record, failed_record, fake_config, fake_plan

from peft_vit.errors import UserError
from peft_vit.records import RECORD_FILE, STUDY_FILE, StudyFile, read_study_file, write_study_file
from peft_vit.studies.scheduler import difference, go_on, study_file

pytestmark = pytest.mark.part("runner")


def asked(config, runs=None, *, smoke=False, data="d") -> StudyFile:
    names = {f"{one.name}/seed_{seed}" for one in config.experiments for seed in config.seeds} if runs is None else runs
    return study_file(config, names, smoke=smoke, data_sha256=data)


def with_rank(config, name, rank):
    changed = [
        one.model_copy(update={"lora": one.lora.model_copy(update={"rank": rank})}) if one.name == name else one
        for one in config.experiments
    ]
    return config.model_copy(update={"experiments": tuple(changed)})


@pytest.fixture
def begun(tmp_path):
    """Return a folder in which a study of a and b, seeds 0 and 1, was begun."""
    write_study_file(tmp_path, asked(fake_config(("a", "b"), (0, 1))))
    return tmp_path


def test_it_is_read_as_it_was_written(tmp_path) -> None:
    assert read_study_file(tmp_path) is None
    content = asked(fake_config(("a", "b"), (3, 1), execution={"workers": 4}), {"a/seed_3", "b/seed_1"})
    assert content.runs == ("a/seed_3", "a/seed_1", "b/seed_3", "b/seed_1")
    assert content.skipped == ("a/seed_1", "b/seed_3")
    write_study_file(tmp_path, content)
    assert read_study_file(tmp_path) == content


def test_seeds_and_experiments_may_be_added_in_any_order(begun) -> None:
    more = fake_config(("c", "b", "a"), (2, 1, 0))
    content = go_on(begun, read_study_file(begun), asked(more), source="s.yaml")
    assert content.configuration == more
    assert set(content.runs) == {f"{name}/seed_{seed}" for name in "abc" for seed in range(3)}
    assert content.skipped == ()


def test_what_no_result_depends_on_may_change(begun) -> None:
    other = fake_config(("a", "b"), (0, 1), execution={"workers": 7, "retries": 0}, description="other words")
    assert go_on(begun, read_study_file(begun), asked(other), source="s.yaml").configuration == other


def test_runs_that_a_command_leaves_out_are_skipped_until_one_asks_for_them(begun) -> None:
    config = fake_config(("a", "b"), (0, 1))
    content = go_on(begun, read_study_file(begun), asked(config, {"a/seed_0"}), source="s.yaml")
    assert content.skipped == ("a/seed_1", "b/seed_0", "b/seed_1")
    write_study_file(begun, content)
    content = go_on(begun, read_study_file(begun), asked(config, {"b/seed_0", "b/seed_1"}), source="s.yaml")
    assert content.skipped == ("a/seed_0", "a/seed_1")


CHANGES = {
    "rank": (lambda config: with_rank(config, "b", 3), ["experiments:", "b:", "lora:", "-rank: 2", "+rank: 3"]),
    "threads": (lambda config: config.model_copy(update={"threads": 1}), ["-threads: 2", "+threads: 1"]),
    "a seed less": (lambda config: config.model_copy(update={"seeds": (1, 5)}), ["seeds:", "-- 0"]),
    "an experiment less": (
        lambda config: config.model_copy(update={"experiments": config.experiments[:1]}),
        ["experiments:", "-b:", "-name: b"],
    ),
    "a setting more": (
        lambda config: config.model_copy(update={"data": config.data.model_copy(update={"train_images": 9})}),
        ["data:", "+train_images: 9"],
    ),
    "another study of the same name": (lambda _: fake_config(("x",), (0, 1)), ["-experiments:", "-a:", "-b:"]),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_refused_with_the_difference(begun, change) -> None:
    make, expected = CHANGES[change]
    before = (begun / STUDY_FILE).read_bytes()
    with pytest.raises(UserError) as caught:
        go_on(begun, read_study_file(begun), asked(make(fake_config(("a", "b"), (0, 1)))), source="s.yaml")
    said = str(caught.value)
    assert said.startswith(f"{begun / STUDY_FILE}: configuration: was begun with another configuration, see below")
    assert "choose another --output" in said
    header, other, *lines = caught.value.details.splitlines()
    assert (header, other) == (f"--- {begun / STUDY_FILE}", "+++ s.yaml")
    place = 0
    squeezed = [line[0].strip() + line[1:].strip() for line in lines]
    for line in expected:
        place = squeezed.index(line, place)
    assert (begun / STUDY_FILE).read_bytes() == before


def test_other_images_and_smoke_are_other_studies(begun) -> None:
    config = fake_config(("a", "b"), (0, 1))
    with pytest.raises(UserError, match="begun with other images"):
        go_on(begun, read_study_file(begun), asked(config, data="e"), source="s.yaml")
    with pytest.raises(UserError, match="smoke: belongs to a real study, not to a smoke study"):
        go_on(begun, read_study_file(begun), asked(config, smoke=True), source="s.yaml")


def test_a_part_adds_its_runs_and_leaves_the_others(begun) -> None:
    part = fake_config(("b", "c"), (1, 4))
    content = go_on(begun, read_study_file(begun), asked(part), source="images", part=True)
    assert [one.name for one in content.configuration.experiments] == ["a", "b", "c"]
    assert content.configuration.seeds == (0, 1, 4)
    assert set(content.runs) - set(content.skipped) == {"b/seed_1", "b/seed_4", "c/seed_1", "c/seed_4"}
    assert content.skipped == ("a/seed_0", "a/seed_1", "b/seed_0")
    with pytest.raises(UserError, match="another configuration"):
        go_on(begun, read_study_file(begun), asked(with_rank(part, "b", 3)), source="images", part=True)
    assert (
        go_on(begun, read_study_file(begun), asked(with_rank(part, "c", 3)), source="images", part=True)
        .configuration.experiments[2]
        .lora.rank
        == 3
    )


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


def test_the_difference_shows_what_changed_and_where_it_stands() -> None:
    old = {"a": 1, "b": {"c": [1, 2, 3], "d": {"e": 1, "f": 2}}, "g": {"h": 1}}
    new = {"a": 1, "b": {"c": [1, 3], "d": {"e": 1, "f": 5}}, "g": {"h": 1, "i": 2}}
    assert difference(old, new, "x", "y").splitlines() == [
        "--- x",
        "+++ y",
        " b:",
        "   c:",
        "-  - 2",
        "   d:",
        "-    f: 2",
        "+    f: 5",
        " g:",
        "+  i: 2",
    ]
    assert yaml.safe_load("b:\n  c:\n  - 2")  # the indentation that is expected above is PyYAML's


def recorded(folder, record) -> None:
    """Put a record of a/seed_0 into a study's folder."""
    file = folder / "a" / "seed_0" / RECORD_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(record.model_dump_json())


def after(folder, config, part) -> StudyFile:
    """Return what study.json says once a command has asked for more."""
    write_study_file(folder, go_on(folder, read_study_file(folder), asked(config), source="s.yaml", part=part))
    return read_study_file(folder)


@pytest.mark.parametrize("part", [False, True])
def test_seeds_that_are_added_after_results_are_remembered(begun, part) -> None:
    spec = fake_plan(fake_config(("a",), (0,)), begun).runs[0].spec
    assert after(begun, fake_config(("a", "b"), (0, 1, 2)), part).seeds_added == ()
    recorded(begun, failed_record(spec, "killed"))
    assert after(begun, fake_config(("a", "b"), (0, 1, 2, 3)), part).seeds_added == ()
    recorded(begun, done_record(spec))
    assert after(begun, fake_config(("a", "b", "c"), (3, 1, 2, 0)), part).seeds_added == ()
    assert after(begun, fake_config(("a", "b", "c"), (0, 1, 2, 3, 7, 5)), part).seeds_added == (7, 5)
    assert after(begun, fake_config(("a", "b", "c"), (0, 1, 2, 3, 5, 7)), part).seeds_added == (7, 5)
    assert after(begun, fake_config(("a", "b", "c"), (0, 1, 2, 3, 5, 7, 9)), part).seeds_added == (7, 5, 9)


LOOKS = {"control": "a", "asked": "superiority", "every": 2}


@pytest.mark.parametrize(
    ("before", "now"),
    [
        ((("a", "b"), (0, 1), None), (("a", "b"), (0, 1), LOOKS)),
        ((("a", "b"), (0, 1), LOOKS), (("a", "b"), (0, 1), None)),
        ((("a", "b"), (0, 1), LOOKS), (("a", "b"), (0, 1), {**LOOKS, "level": 0.1})),
        ((("a", "b"), (0, 1), LOOKS), (("a", "b"), (1, 0), LOOKS)),
        ((("a", "b"), (0, 1), LOOKS), (("a", "b", "c"), (0, 1), LOOKS)),
        ((("a", "b", "c"), (0, 1), LOOKS), (("a", "b"), (0, 1), LOOKS)),
        ((("a", "b"), (0, 1), LOOKS), (("a", "b"), (0, 1, 2, 3), LOOKS)),
    ],
)
def test_what_was_declared_of_looks_stays(tmp_path, before, now) -> None:
    first, second = (
        fake_config(names, seeds, **({"stopping": said} if said else {})) for names, seeds, said in (before, now)
    )
    write_study_file(tmp_path, asked(first))
    assert go_on(tmp_path, read_study_file(tmp_path), asked(first), source="s.yaml").seeds_added == ()
    with pytest.raises(UserError, match="was begun with another configuration"):
        go_on(tmp_path, read_study_file(tmp_path), asked(second), source="s.yaml")
