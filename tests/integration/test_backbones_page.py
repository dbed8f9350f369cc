"""docs/reference/backbones.md says what benchmarks/results/backbones.csv holds."""

from __future__ import annotations

import backbones as script
import pandas as pd
from marks import filled


def test_the_page_says_what_results_hold() -> None:
    rows, text = pd.read_csv(script.ROWS), script.DOCUMENT.read_text(encoding="utf-8")
    assert filled(text, script.tables(rows)) == text, "run benchmarks/backbones.py"
    rows.loc[0, "onnx_error"] = 1.0
    assert filled(text, script.tables(rows)) != text


def test_each_architecture_is_named_once_and_marked_where_peft_has_no_effect() -> None:
    rows = pd.read_csv(script.ROWS)
    text = script.each(rows)
    assert all(text.count(f"`{name}`") == count for name, count in rows.model.value_counts().items())
    marked = {name for name in rows.model if f"`{name}`\\*" in text}
    assert marked == set(rows.model[rows.peft_idle.notna()])
