"""How numbers, names, texts of others and tables in a terminal are written."""

import io
from collections.abc import Callable
from typing import Any

import pytest
from rich.console import Console

from peft_vit.base.statistics import mean_interval
from peft_vit.deploy.page.document import Paragraph, Table
from peft_vit.deploy.page.files import escaped, soft
from peft_vit.deploy.page.formatting import fixed, megabytes, percent, percent_interval, plain, points_interval, signed
from peft_vit.deploy.page.lines import smoothed
from peft_vit.deploy.page.printed import print_blocks
from peft_vit.lab.report.build import slug_of


@pytest.mark.parametrize(
    ("write", "texts"),
    [
        (percent, {0.8034: "80.3 %"}),
        (percent_interval, {mean_interval([0.80, 0.82]): "81.0 % [68.3, 93.7]"}),
        (percent_interval, {mean_interval([0.8]): "80.0 % [no interval]"}),
        (lambda value: fixed(value, 1), {0.75: "0.8", 0.75 - 1e-14: "0.8"}),  # however it was summed up
        (fixed, {-0.001: "0.00"}),
        (signed, {1.24: "+1.2", -0.5: "−0.5", 0.0: "0.0", -0.04: "0.0"}),
        (points_interval, {mean_interval([0.01]): "+1.0 [no interval]", None: "not computed"}),
        (megabytes, {0: "0.0 MB", 12_345: "0.01 MB", 86_000_000: "86.0 MB"}),
        (plain, {"a\nb\x00\u202ec\t d": "a b c d"}),
        (escaped, {"lora_r8": "lora_r8"}),
        (escaped, {"_a_ *b* <c> | `d` [e](f) [1, 2]": r"\_a\_ \*b\* &lt;c&gt; \| \`d\` [e\](f) [1, 2]"}),
        (soft, {"<b>lora_r8</b> 80.3 % (n = 2)": "&lt;b&gt;lora_<wbr>r8&lt;/<wbr>b&gt; 80.3\u00a0% (n\u00a0=\u00a02)"}),
        (slug_of, {"Quick Start": "quick_start", "../../etc": "etc", "<>": "study", "é": "study"}),
    ],
)
def test_what_is_written(write: Callable[[Any], str], texts: dict[Any, str]) -> None:
    assert {value: write(value) for value in texts} == texts


def test_smoothing_is_a_centered_mean() -> None:
    assert smoothed([0.0, 3.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 4.0, 4.5])
    assert smoothed([1.0, 2.0], 1) == pytest.approx([1.0, 2.0])


def test_a_table_in_a_terminal_has_columns_or_is_a_list_loses_nothing_and_moves_nothing() -> None:
    rows = (("lora_r8", "[bold]12[/bold]", "yes"), ("linear", "x" * 30, "no\x1b[2J"))
    table = Table("t", "Sizes", ("experiment", "a column of many words", "fits?"), rows, "A note.", ())
    wide, narrow = (io.StringIO(), io.StringIO())
    for file, width in ((wide, 80), (narrow, 40)):
        print_blocks([Paragraph("First [red]line\nsecond"), table], Console(file=file, width=width, highlight=False))
    lines = [line.rstrip() for line in wide.getvalue().splitlines()]
    assert lines[:2] == ["First [red]line", "second"]
    (row,) = [line for line in lines if "lora_r8" in line]
    assert row.split() == ["lora_r8", "[bold]12[/bold]", "yes"], "nothing is taken for markup"
    assert "A note." in lines
    listed = [line.rstrip() for line in narrow.getvalue().splitlines()]
    place = listed.index("linear")
    assert listed[place + 1 : place + 3] == [f"  a column of many words: {'x' * 30}", "  fits? no\\x1b[2J"]
    assert "\x1b" not in wide.getvalue() + narrow.getvalue()
