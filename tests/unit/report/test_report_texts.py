"""How numbers, names and texts of others are written."""

from collections.abc import Callable
from typing import Any

import pytest

from peft_vit.report.accuracy_figures import short_count, side_by_side
from peft_vit.report.build import slug_of
from peft_vit.report.formatting import fixed, megabytes, percent, percent_interval, plain, points_interval, signed
from peft_vit.report.html import soft
from peft_vit.report.lines import smoothed
from peft_vit.report.markdown import escaped
from peft_vit.statistics import mean_interval


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
        (short_count, {10: "10", 1e3: "1k", 2e6: "2M", 1e9: "1G"}),
        (plain, {"a\nb\x00\u202ec\t d": "a b c d"}),
        (escaped, {"lora_r8": "lora_r8"}),
        (escaped, {"_a_ *b* <c> | `d` [e](f) [1, 2]": r"\_a\_ \*b\* &lt;c&gt; \| \`d\` [e\](f) [1, 2]"}),
        (soft, {"<b>lora_r8</b> 80.3 % (n = 2)": "&lt;b&gt;lora_<wbr>r8&lt;/b&gt; 80.3\u00a0% (n\u00a0=\u00a02)"}),
        (slug_of, {"Quick Start": "quick_start", "../../etc": "etc", "<>": "study", "é": "study"}),
    ],
)
def test_what_is_written(write: Callable[[Any], str], texts: dict[Any, str]) -> None:
    assert {value: write(value) for value in texts} == texts


def test_smoothing_is_a_centered_mean_and_markers_at_one_place_stand_side_by_side() -> None:
    assert smoothed([0.0, 3.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 4.0, 4.5])
    assert smoothed([1.0, 2.0], 1) == pytest.approx([1.0, 2.0])
    first, second, third, elsewhere = side_by_side([100.0, 100.1, 100.0, 150.0])
    assert first == elsewhere == 0 < second < third
