import pytest

from peft_vit.report.formatting import fixed, megabytes, percent, percent_interval, plain, points_interval, signed
from peft_vit.report.html import soft
from peft_vit.report.lines import smoothed
from peft_vit.report.markdown import escaped
from peft_vit.report.scatter import short_count, side_by_side
from peft_vit.report.sections import slug_of
from peft_vit.statistics import mean_interval


def test_percent_has_one_decimal() -> None:
    assert percent(0.8034) == "80.3 %"
    assert percent_interval(mean_interval([0.80, 0.82])) == "81.0 % [68.3, 93.7]"
    assert percent_interval(mean_interval([0.8])) == "80.0 % [no interval]"


def test_a_half_is_rounded_alike_however_it_was_summed_up() -> None:
    assert fixed(0.75 - 1e-14, 1) == fixed(0.75, 1) == "0.8"


def test_differences_have_a_sign() -> None:
    assert [signed(v) for v in (1.24, -0.5, 0.0, -0.04)] == ["+1.2", "−0.5", "0.0", "0.0"]
    assert points_interval(mean_interval([0.01])) == "+1.0 [no interval]"
    assert points_interval(None) == "not computed"
    assert fixed(-0.001) == "0.00"


def test_bytes_are_decimal() -> None:
    assert [megabytes(v) for v in (0, 12_345, 86_000_000)] == ["0.0 MB", "0.01 MB", "86.0 MB"]


def test_names_of_others_stay_on_one_line() -> None:
    assert plain("a\nb\x00\u202ec\t d") == "a b c d"


def test_markdown_characters_mean_themselves() -> None:
    assert escaped("lora_r8") == "lora_r8"
    assert escaped("_a_ *b* <c> | `d` [e](f) [1, 2]") == r"\_a\_ \*b\* &lt;c&gt; \| \`d\` [e\](f) [1, 2]"


def test_html_text_is_escaped_before_it_gets_breaks() -> None:
    assert soft("<b>lora_r8</b> 80.3 % (n = 2)") == "&lt;b&gt;lora_<wbr>r8&lt;/b&gt; 80.3\u00a0% (n\u00a0=\u00a02)"


@pytest.mark.parametrize(
    ("name", "slug"), [("Quick Start", "quick_start"), ("../../etc", "etc"), ("<>", "study"), ("é", "study")]
)
def test_slugs_are_safe_in_file_names(name: str, slug: str) -> None:
    assert slug_of(name) == slug


def test_smoothing_is_a_centered_mean() -> None:
    assert smoothed([0.0, 3.0, 6.0, 3.0], 3) == pytest.approx([1.5, 3.0, 4.0, 4.5])
    assert smoothed([1.0, 2.0], 1) == pytest.approx([1.0, 2.0])


def test_markers_at_one_place_standside_by_side() -> None:
    first, second, third, elsewhere = side_by_side([100.0, 100.1, 100.0, 150.0])
    assert first == elsewhere == 0
    assert 0 < second < third


def test_counts_on_an_axis_are_short() -> None:
    assert [short_count(v) for v in (10, 1e3, 2e6, 1e9)] == ["10", "1k", "2M", "1G"]
