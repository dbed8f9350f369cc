import io

from rich.console import Console

from peft_vit.report.document import Paragraph, Table
from peft_vit.report.printed import print_blocks

TABLE = Table(
    slug="t",
    title="Sizes",
    columns=("experiment", "a column of many words", "fits?"),
    rows=(("lora_r8", "[bold]12[/bold]", "yes"), ("linear", "x" * 30, "no\x1b[2J")),
    note="A note.",
    data=(),
)


def printed(width: int) -> list[str]:
    file = io.StringIO()
    print_blocks([Paragraph("First [red]line\nsecond"), TABLE], Console(file=file, width=width, highlight=False))
    return [line.rstrip() for line in file.getvalue().splitlines()]


def test_a_table_that_fits_has_columns() -> None:
    lines = printed(80)
    assert lines[:2] == ["First [red]line", "second"]
    (row,) = [line for line in lines if "lora_r8" in line]
    assert row.split() == ["lora_r8", "[bold]12[/bold]", "yes"], "nothing is taken for markup"
    assert "A note." in lines


def test_a_table_that_is_too_wide_becomes_a_list_and_loses_nothing() -> None:
    lines = printed(40)
    place = lines.index("linear")
    assert lines[place + 1 : place + 3] == [f"  a column of many words: {'x' * 30}", "  fits? no\\x1b[2J"]


def test_nothing_moves_the_terminal() -> None:
    assert all("\x1b" not in line for width in (40, 80) for line in printed(width))
