"""What people type who come from other tools is answered by how it is typed here."""

import pytest

from peft_vit.cli import app, main


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        (["train", "data=photos"], "data=photos: options are written as --data photos"),
        (["train", "photos", "image_size=224"], "image_size=224: options are written as --image-size 224"),
        (["val", "photos"], "it is peft-vit test"),
    ],
)
def test_how_it_is_typed_here(typed: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(typed)
    assert ended.value.code == 2
    assert says in capsys.readouterr().err


def test_exit_codes_are_a_paragraph_of_the_help() -> None:
    texts = [command.help or "" for command in app.registered_commands]
    assert all(text.count("codes:") == text.count("\n\nExit codes:") for text in texts)
    assert sum("Exit codes:" in text for text in texts) > 10
