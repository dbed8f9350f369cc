"""A session: what comes next, what the test fifth never shows, and what can be taken back."""

import shutil
import threading
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from label_sessions import session_of, write_digits
from PIL import Image

from peft_vit.base.errors import UserError
from peft_vit.label.features import Computed
from peft_vit.label.images import ImageFolder
from peft_vit.label.labels import ConflictError, LabelStore, Row
from peft_vit.label.order import herding, wall
from peft_vit.label.session import Session, Shown


@pytest.mark.parametrize("order", ["herding", "random", "files"])
def test_every_fifth_is_for_the_test_and_comes_without_a_proposal(order, tmp_path, monkeypatch) -> None:
    """All is labelled as it is shown, with a fit after each answer."""
    monkeypatch.setattr("peft_vit.label.order.FEWEST_OF_CLASS", 3)
    truth = write_digits(tmp_path, 45, classes=2)
    session, shown, herded, labels_for_walls = session_of(tmp_path, order=order), [], [], []

    def watched_herding(features, labelled, available, *rest) -> list[int]:
        herded.append((labelled >= 0) | available)
        return herding(features, labelled, available, *rest)

    def watched_wall(probabilities, available, num_labelled) -> tuple[int, list[int]] | None:
        labels_for_walls.append((num_labelled, session.state()["counts"].total()))
        return wall(probabilities, available, num_labelled)

    monkeypatch.setattr("peft_vit.label.session.herding", watched_herding)
    monkeypatch.setattr("peft_vit.label.session.wall", watched_wall)
    while (state := session.state())["ids"]:
        shown.append(state)
        label = state["proposed"] if state["is_wall"] else truth[state["names"][0]]
        wrong = [i for i, name in zip(state["ids"], state["names"], strict=True) if truth[name] != label]
        session.record(state["ids"], [label], wrong=wrong)
        session.fit()
    rows = LabelStore(tmp_path).rows
    assert {name: row.labels[0] for name, row in rows.items()} == truth
    tested = {name for name, row in rows.items() if row.split == "test"}
    assert {name for state in shown for name in state["names"] if state["is_test"]} == tested
    assert all(state["proposed"] is None for state in shown if state["is_test"])
    assert not any(tested & set(state["names"]) for state in shown if state["is_wall"])
    early = [state for state in shown if state["labelled"] < 25]
    assert all(state["tested"] <= state["labelled"] // 5 + 1 for state in early)
    assert any(state["proposed"] for state in early)
    assert "labelled test images" in session.state()["accuracy"]
    assert all(ruled == counted for ruled, counted in labels_for_walls)
    assert labels_for_walls[-1][0] == 45 - len(tested)
    if order == "files":
        alone = [state["names"][0] for state in shown if not state["is_wall"] and not state["is_test"]]
        assert alone[:5] == sorted(alone[:5])
    if order == "herding":
        assert not (np.array(herded) & [name in tested for name in session.images.names]).any()


def test_the_test_fifth_follows_from_content_and_takes_copies_along(tmp_path) -> None:
    write_digits(tmp_path, 60)
    before = ImageFolder(tmp_path)
    drawn = {name: before.is_test(i) for i, name in enumerate(before.names)}
    (tmp_path / "more").mkdir()
    for name in before.names:
        shutil.copy(tmp_path / name, tmp_path / "more" / f"copy_{name}")
    Image.new("L", (8, 8)).save(tmp_path / "a_new_one.png")
    after = ImageFolder(tmp_path)
    for i, name in enumerate(after.names):
        if name != "a_new_one.png":
            assert after.is_test(i) == drawn[Path(name).name.removeprefix("copy_")]
    session = session_of(tmp_path)
    session.fit()  # which has seen what all of them hold
    ids = session.state()["ids"]
    for label in ("cat", "dog"):
        session.record(ids, [label])
        assert [row.labels for row in LabelStore(tmp_path).rows.values()] == [(label,)] * 2  # with its copy
        session.undo()
    session.refuse(ids)
    assert LabelStore(tmp_path).rows == {}


def test_what_cannot_be_shown_is_skipped_and_listed(tmp_path) -> None:
    truth = write_digits(tmp_path, 10)
    (tmp_path / "broken.png").write_bytes(b"no image")
    (tmp_path / "gone.png").symlink_to("nowhere")
    outside = tmp_path.parent / "outside.png"
    Image.new("L", (9, 9)).save(outside)
    (tmp_path / "link.png").symlink_to(outside)
    session = session_of(tmp_path, order="random")
    while (state := session.state())["ids"]:
        session.record(state["ids"], [truth[state["names"][0]]])
    assert len(session.store.rows) == 10
    left_out = session.images.left_out
    assert set(left_out) == {"broken.png", "gone.png", "link.png"}
    assert left_out["link.png"].startswith("lies outside")
    assert not session.images.is_sound(session.images.number["link.png"], 64)


def test_skipped_images_come_last_and_unsure_ones_not_again(tmp_path) -> None:
    session = session_of(tmp_path, digits=6, order="random")
    skipped = session.state()["ids"]
    session.refuse(skipped)
    session.record(session.state()["ids"], [], "too dark", unsure=True)
    rest = []
    while ids := session.state()["ids"]:
        rest.append(ids)
        session.record(ids, ["cat"])
    assert len(rest) == len({*rest}) == 5
    assert rest[-1] == skipped
    state = session.state()
    of_test = sum(row.split == "test" for row in session.store.rows.values())
    assert (state["labelled"], state["counts"]["cat"], state["counts_of_test"]["cat"]) == (5, 5 - of_test, of_test)


@pytest.mark.parametrize(
    ("task", "labels", "fault"),
    [
        ("classification", ["a", "b"], "expected one"),
        ("regression", ["ten"], "expected a number"),
        ("regression", ["nan"], "expected a number"),
        ("multilabel", ["a/b"], "expected 1 to 80 letters"),
    ],
)
def test_what_is_no_label_is_refused_and_nothing_written(task, labels, fault, tmp_path) -> None:
    session = session_of(tmp_path, digits=6, task=task)
    with pytest.raises(UserError, match=fault):
        session.record(session.state()["ids"], labels)
    assert not (tmp_path / "labels.csv").exists()
    with pytest.raises(UserError, match="no answer before"):
        session.undo()


@pytest.mark.parametrize("files", [[], ["a.txt"], ["broken.png"]])
def test_a_folder_without_images_is_refused(files, tmp_path) -> None:
    for name in files:
        (tmp_path / name).symlink_to("nowhere")
    with pytest.raises(UserError, match="holds no image"):
        ImageFolder(tmp_path)
    with pytest.raises(UserError, match="is not a folder"):
        ImageFolder(tmp_path / "other")


def test_an_image_that_is_renamed_or_deleted_meanwhile_costs_no_label(tmp_path) -> None:
    session = session_of(tmp_path, digits=6)
    session.record([0, 1], ["cat"])
    names = session.images.names
    (tmp_path / names[0]).unlink()
    (tmp_path / names[1]).rename(tmp_path / "other.png")
    (tmp_path / names[2]).unlink()  # has no label yet
    left = []
    while (ids := session.state()["ids"]) != ():
        left += ids
        session.record(ids, ["dog"])
    assert sorted(left) == [3, 4, 5]
    assert list(session.images.left_out) == [names[2]]
    later = session_of(tmp_path)
    assert "2 of them no longer there" in later.state()["counted"]
    assert later.state()["names"] == ["other.png"]
    assert later.store.rows == session.store.rows
    assert [later.store.rows[names[i]].labels for i in (0, 1, 3)] == [("cat",), ("cat",), ("dog",)]


def modelled(folder: Path, order: str) -> Session:
    """Return a session, fitted once, of a model that knows 0 and 1: it is surer of 1 the later an image comes."""
    session = session_of(folder, digits=20)
    computed = session.features.read()
    probabilities = np.stack([np.linspace(0.9, 0.1, 20), np.linspace(0.1, 0.9, 20)], 1)
    known = computed._replace(probabilities=probabilities, distances=np.arange(20.0) % 7)
    features = SimpleNamespace(fault="", read=lambda: known)
    session = Session(session.store, session.images, features, order, ("digit 0", "digit 1"))
    session.fit()
    return session


def test_a_model_proposes_until_it_does_not_know_a_class(tmp_path) -> None:
    session = modelled(tmp_path, "files")
    while (state := session.state())["is_test"]:
        session.record(state["ids"], ["digit 1"])
    assert state["classes"] == ["digit 0", "digit 1"]
    assert state["proposed"] == "digit 0"
    session.record(state["ids"], ["digit 2"])
    session.fit()
    assert session._proposals == {}  # one label is too few for another model


def test_unlike_images_come_first_and_those_for_the_test_are_not_chosen(tmp_path) -> None:
    session = modelled(tmp_path, "unlike")
    free = [i for i in range(20) if not session.images.is_test(i)]
    assert session._chosen == sorted(free, key=lambda i: -(i % 7))[:5]


def test_what_cannot_be_computed_is_said_and_labelling_continues(tmp_path, monkeypatch) -> None:
    session, stop = session_of(tmp_path, digits=5), threading.Event()

    def fail() -> None:
        stop.set()
        raise ValueError("no header")

    monkeypatch.setattr(session.features, "read", fail)
    session.work(stop)
    state = session.state()
    assert state["trouble"] == "ValueError: no header"
    session.record(state["ids"], ["cat"])
    assert session.state()["labelled"] == 1


def test_the_last_features_are_used_though_they_are_few(tmp_path, monkeypatch) -> None:
    session, stop, ready = session_of(tmp_path, digits=20), threading.Event(), [19, 20]

    def fit() -> None:
        session._ready = ready.pop(0)
        if not ready:
            stop.set()

    monkeypatch.setattr(session, "fit", fit)
    monkeypatch.setattr(session, "_find_copies", lambda: None)
    monkeypatch.setattr(session.features, "read", lambda: Computed(None, np.arange(ready[0]), None, None))
    ends = threading.Timer(20, stop.set)
    ends.start()
    session.work(stop)
    ends.cancel()
    assert not ready


def test_images_clicked_wrong_come_alone_and_on_no_other_wall(tmp_path) -> None:
    write_digits(tmp_path, 40, classes=2)
    session = session_of(tmp_path)
    free = [i for i in range(40) if not session.images.is_test(i)]
    session.record(free[:4], ["a"], wrong=free[2:3])
    session.record(free[4:6], ["b"])
    session._offered = Shown((free[2], free[6]), is_wall=True, proposed="a")
    for ids, is_wall in (((free[2],), False), ((free[6],), True)):
        while (state := session.state())["is_test"]:
            session.record(state["ids"], ["a"])
        assert (state["ids"], state["is_wall"]) == (ids, is_wall)
        session.record(state["ids"], ["b"])


def test_a_split_that_is_written_down_is_kept_to(tmp_path) -> None:
    write_digits(tmp_path, 30)
    for name in ("d000.png", "d001.png"):
        shutil.copy(tmp_path / name, tmp_path / f"copy_{name}")
    images = ImageFolder(tmp_path)
    is_test = {name: images.is_test(i) for i, name in enumerate(images.names)}
    other = {name: "train" if is_test[name] else "test" for name in ("d000.png", "d001.png")}
    LabelStore(tmp_path).change({name: Row(("cat",), other[name], "mine") for name in other}, {})
    session = session_of(tmp_path)
    session.fit()
    number = session.images.number
    session.record([number["copy_d000.png"], number["copy_d001.png"]], ["dog"], wrong=[number["copy_d001.png"]])
    assert session.store.rows == {
        "d000.png": Row(("cat",), other["d000.png"], "mine"),
        "d001.png": Row(("cat",), other["d001.png"], "mine"),
        "copy_d000.png": Row(("dog",), other["d000.png"]),
    }


def test_going_back_changes_that_answer_alone(tmp_path) -> None:
    session = session_of(tmp_path, digits=12)
    for label in ("cat", "dog", "cow"):
        session.record(session.state()["ids"], [label])
    names, next_ids = list(session.store.rows), session.state()["ids"]
    assert session.state()["former"] is None
    for name, label in zip(names[:0:-1], ("cow", "dog"), strict=True):  # a second time, the one before
        session.undo()
        state = session.state()
        assert (state["names"], state["former"]["labels"], state["proposed"]) == ([name], (label,), label)
    rows = session.store.rows
    assert [rows[name].labels for name in names] == [("cat",), ("dog",), ("cow",)]
    session.record(state["ids"], ["elk"], "sure")
    assert LabelStore(tmp_path).rows == {**rows, names[1]: rows[names[1]]._replace(labels=("elk",), comment="sure")}
    assert session.state()["ids"] == next_ids  # goes on where one was
    session.undo()
    assert session.state()["names"] == names[2:]
    session.undo()
    assert session.state()["former"]["comment"] == "sure"
    session.record(session.state()["ids"], [], unsure=True)
    assert session.store.rows[names[1]].split == "unsure"
    for _ in range(3):
        session.undo()
    assert not session.state()["undoable"]
    with pytest.raises(UserError):
        session.undo()
    session.refuse(session.state()["ids"])
    assert set(session.store.rows) == set(names[1:])


def test_going_back_to_a_wall_takes_images_out_of_it(tmp_path) -> None:
    session = session_of(tmp_path, digits=12)
    free = [i for i in range(12) if not session.images.is_test(i)]
    session.record(free[:4], ["a"], wrong=free[3:4])
    session.undo()
    state = session.state()
    assert (state["is_wall"], state["ids"], state["proposed"]) == (True, tuple(free[:3]), "a")
    session.record(free[:3], ["a"], wrong=free[1:2])
    assert set(session.store.rows) == {session.images.names[i] for i in (free[0], free[2])}
    session.undo()
    session.record([free[0], free[2]], ["a"], wrong=[free[0], free[2]])
    assert session.store.rows == {}
    assert not session.state()["undoable"]


def test_an_answer_that_another_page_changed_is_left_as_it_is(tmp_path) -> None:
    session = session_of(tmp_path, digits=6)
    names = session.images.names
    for i in range(3):
        session.record([i], ["cat"])
    session.undo()
    LabelStore(tmp_path).change({names[k]: Row(("dog",), "train") for k in (1, 2)}, {})
    with pytest.raises(ConflictError):
        session.record([2], ["cow"])
    with pytest.raises(ConflictError):
        session.undo()
    session.undo()
    assert session.state()["names"] == names[:1]
    assert [session.store.rows[name].labels for name in names[:3]] == [("cat",), ("dog",), ("dog",)]


def test_an_answer_that_the_disk_does_not_take_can_be_given_again(tmp_path, monkeypatch) -> None:
    session = session_of(tmp_path, digits=4)
    session.record([0], ["cat"])
    session.undo()

    def fail(*_: object) -> None:
        raise UserError("no space")

    with monkeypatch.context() as full:
        full.setattr(session.store, "change", fail)
        with pytest.raises(UserError, match="no space"):
            session.record([0], ["dog"])
    assert session.state()["former"]["labels"] == ("cat",)
    session.record([0], ["dog"])
    assert [row.labels for row in session.store.rows.values()] == [("dog",)]


def test_a_class_without_a_test_image_is_named_and_test_images_come_first(tmp_path) -> None:
    truth = write_digits(tmp_path, 60, classes=2)
    session = session_of(tmp_path)
    names = {label: [name for name in session.images.names if truth[name] == label] for label in ("digit 0", "digit 1")}
    is_test = {name: session.images.is_test(i) for i, name in enumerate(session.images.names)}
    rows = {name: Row((label,), "train") for label in names for name in [n for n in names[label] if not is_test[n]][:2]}
    rows |= {name: Row(("digit 0",), "test") for name in names["digit 0"] if is_test[name]}
    of_train, _, _, *more = [*rows][2:]  # leaves one test image
    LabelStore(tmp_path).change({name: row for name, row in rows.items() if name != of_train}, {})
    assert session.state()["untested"] == ""  # training could not begin
    LabelStore(tmp_path).change({of_train: rows[of_train], **dict.fromkeys(more)}, {})
    state = session.state()
    assert "'digit 1'" in state["untested"]
    assert "digit 0" not in state["untested"]
    assert not state["tests_first"]
    session.ask_tests()
    shown = []
    while (state := session.state())["tests_first"]:
        assert (state["is_test"], state["proposed"]) == (True, None)
        shown.append(truth[state["names"][0]])
        session.record(state["ids"], shown[-1:])
    assert shown.count("digit 1") == 1  # the last one
    assert state["untested"] == ""
    assert not state["is_test"]
    LabelStore(tmp_path).change({name: Row((truth[name],), "test") for name in truth if is_test[name]}, {})
    with pytest.raises(UserError) as nothing_left:
        session.ask_tests()
    assert nothing_left.value.field == "tests"
