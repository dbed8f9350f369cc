"""Files of others are read without waiting and up to a limit; folders are not left."""

import os
from pathlib import Path

import pytest

from peft_vit.base.console import quoted
from peft_vit.base.errors import UserError
from peft_vit.base.files import folder_below, read_bytes, take_name, whole_folder


def test_a_file_is_read_up_to_its_limit(tmp_path) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"12345")
    (tmp_path / "link").symlink_to(file)
    assert (
        read_bytes(file) == read_bytes(file, 5) == read_bytes(file, None) == read_bytes(tmp_path / "link") == b"12345"
    )
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_bytes(file, 4)


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("pipe", "not a regular file"),
        ("endless", "not a regular file"),
        (".", "Is a directory"),
        ("nothing", "No such file"),
        ("loop", "Too many levels"),
        ("a\0b", "impossible name"),
        ("x" * 300, "File name too long"),
    ],
)
def test_what_is_no_file_is_refused_at_once(tmp_path, name, words) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "endless").symlink_to("/dev/zero")
    with pytest.raises(OSError, match=words) as caught:
        read_bytes(tmp_path / name)
    assert caught.value.strerror
    assert caught.value.filename == str(tmp_path / name)


@pytest.mark.parametrize("relative", ["..", "a/../../b", "/etc", "", "a\0b"])
def test_a_folder_that_leads_out_is_refused(relative, tmp_path) -> None:
    with pytest.raises(UserError, match="leads out of it"):
        folder_below(tmp_path, relative)


def test_links_below_the_root_are_refused_and_above_it_fine(tmp_path) -> None:
    (tmp_path / "real" / "study").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "root").symlink_to(tmp_path / "real")
    assert folder_below(tmp_path / "root", "study/a/seed_0") == tmp_path / "root" / "study" / "a" / "seed_0"
    (tmp_path / "real" / "study" / "a").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(UserError, match=r"study/a: is a link, and results go into real folders only"):
        folder_below(tmp_path / "root", "study/a/seed_0")


@pytest.mark.parametrize("fault", [OSError("disk full"), KeyboardInterrupt()])
@pytest.mark.parametrize("done", [1, 2])
def test_a_folder_that_can_t_be_replaced_stays(tmp_path, monkeypatch, fault, done) -> None:
    """Whether a fault comes instead of the renaming (1) or right after it (2), one whole folder is there."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "file").write_text("before")
    rename, calls = os.replace, []

    def renamed(path, to):
        calls.append(to)
        if len(calls) == 2 and done == 1:
            raise fault
        rename(path, to)
        if len(calls) == 1 and done == 2:
            raise fault

    monkeypatch.setattr(os, "replace", renamed)
    with pytest.raises(type(fault)), whole_folder(target) as made:
        (made / "file").write_text("after")
    assert (target / "file").read_text() == "before"
    assert os.listdir(tmp_path) == ["model"]


def test_a_name_that_another_program_on_windows_holds_is_tried_again(tmp_path, monkeypatch) -> None:
    made, target, left, replace = tmp_path / "made", tmp_path / "there", [1, 2], os.replace
    made.touch(), target.touch()

    def refused(path, to) -> None:
        if left:
            raise PermissionError(left.pop())
        replace(path, to)

    monkeypatch.setattr(os, "replace", refused)
    with pytest.raises(PermissionError):
        take_name(made, target)
    with monkeypatch.context() as windows:
        windows.setattr(os, "name", "nt")
        take_name(made, target)
        assert quoted("train", r"C:\my images") == r'train "C:\my images"'
    assert left == []
    assert os.listdir(tmp_path) == ["there"]


@pytest.mark.parametrize("before", [lambda target: None, Path.mkdir, lambda target: target.symlink_to("/")])
def test_a_whole_folder_takes_the_place_of_what_was_there(tmp_path, before) -> None:
    target = tmp_path / "model"
    before(target)
    with whole_folder(target) as made:
        (made / "file").write_text("after")
    assert (target / "file").read_text() == "after"
    assert os.listdir(tmp_path) == ["model"]
