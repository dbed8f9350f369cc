"""A message is one line of bounded length that does nothing to the terminal it is printed on."""

from pathlib import Path

import pytest
from pydantic import BaseModel, ConfigDict, ValidationError

from peft_vit.base.errors import UserError, agreeing_with, first_fault, named, printable
from peft_vit.core.config import named_as_typed
from peft_vit.fit.request import TrainRequest, TuneRequest


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\tc\x7f", r"a\nb\tc\x7f"),
        ("\x9b31m", r"\x9b31m"),
        ("\u202egnp.exe\u2029", r"\u202egnp.exe\u2029"),
        ("\udce9", r"\udce9"),
        ("Grüße, 日本語 \U0001f44b\u200d", "Grüße, 日本語 \U0001f44b\u200d"),
    ],
)
def test_what_would_move_a_terminal_is_written_out(text, shown) -> None:
    assert printable(text) == shown
    line = str(UserError("is wrong", file=f"{text}.yaml", field=text))
    assert line == f"{shown}.yaml: {shown}: is wrong"
    line.encode()


def test_a_long_name_does_not_hide_the_remedy() -> None:
    line = str(UserError("is wrong; do this", file="x" * 10_000, field="y" * 10_000))
    assert line.endswith(": is wrong; do this")
    assert len(line) < 1100
    assert len(str(UserError("z" * 10_000))) < 2100


@pytest.mark.parametrize(
    ("context", "file", "line"),
    [
        (named(Path("a")), None, "a: seed: is wrong"),
        (named(Path("a")), "b", "b: seed: is wrong"),
        (agreeing_with(Path("a/c.json")), "b", "b: seed: is wrong; or c.json is wrong"),
        (agreeing_with(Path("a/c.json")), None, "a/c.json: seed: is wrong"),
    ],
)
def test_a_file_is_named_where_none_was_and_both_where_two_contradict_each_other(context, file, line) -> None:
    with pytest.raises(UserError) as caught, context:
        raise UserError("is wrong", file=file, field="seed")
    assert str(caught.value) == line


class Numbers(BaseModel):
    model_config = ConfigDict(extra="forbid")

    one: dict[str, int] = {}


@pytest.mark.parametrize(
    ("content", "field"), [({"one": {"a": "x"}}, "one.a"), ({"": 1}, "''"), ({"one": {"": "x"}}, "one.''"), (7, None)]
)
def test_the_first_fault_has_a_field_even_if_it_has_no_name(content, field) -> None:
    with pytest.raises(ValidationError) as caught:
        Numbers.model_validate(content)
    named_field, message = first_fault(caught.value)
    assert named_field == field
    assert message


@pytest.mark.parametrize(
    ("request_type", "field", "named"),
    [
        (TrainRequest, "backbone.model", "--model"),
        (TrainRequest, "data.path", None),
        (TrainRequest, "experiments[0].lora.rank", "--rank"),
        (TrainRequest, "training.unheard_of", None),
        (TrainRequest, "data.shots_per_class", "--shots"),
        (TuneRequest, "data.image_size", "--image-size"),
        (TuneRequest, "backbone.file", "--weights"),
        (TrainRequest, "class_names", "class_names"),
        (TrainRequest, "--rank", "--rank"),
    ],
)
def test_what_a_command_has_filled_in_is_named_as_it_was_typed(request_type, field, named) -> None:
    with pytest.raises(UserError) as caught, named_as_typed(request_type):
        raise UserError("is wrong", file="a.png", field=field)
    assert (caught.value.field, caught.value.file, caught.value.message) == (named, "a.png", "is wrong")
