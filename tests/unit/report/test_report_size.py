"""The report sets what a format claims beside what was counted, layer by layer and for the whole model."""

from pathlib import Path

import pandas as pd
import planted
import pytest

from peft_vit.report import build_report

NF4, INT8 = (planted.experiments()[name] for name in ("qa_lora_4bit_nf4_constant", "qa_lora_8bit_int8_linear"))
WEIGHTS = 21_233_664  # of the quantized layers


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sizes")
    old = planted.record(INT8, 0, 0.8)
    assert old.quantization is not None
    older = {"quantization": old.quantization.model_copy(update={"size": None}), "bits_history": []}
    records = [planted.record(NF4, 0, 0.8), planted.record(INT8, 0, 0.8, changes=older)]
    build_report(planted.write(folder / "results", records), folder)
    return folder


def row(report: Path, table: str, experiment: str) -> list[str]:
    text = (report / "analysis_summary.md").read_text()
    lines = text[text.index(f"**{table}**") :].splitlines()
    found = next(line for line in lines if line.startswith(f"| {experiment} "))
    return [cell.strip() for cell in found.strip("|").split("|")]


def test_claimed_and_measured_stand_side_by_side(report: Path) -> None:
    total = WEIGHTS * 5 / 8 + planted.LEFT_IN_FLOAT + 3080
    bits = 8 * total / (planted.BACKBONE_PARAMETERS + 770)
    expected = [
        "8.0 ×",
        "5.00",
        "6.4 ×",
        "3.2 ×",
        f"{bits:.2f}",
        f"{32 / bits:.1f} ×",
        f"{16 / bits:.1f} ×",
        f"{total / 1e6:.1f} MB",
        f"{(total + 9000) / 1e6:.1f} MB",
        "900.0 MB",
    ]
    assert row(report, "How much smaller: claimed and measured", NF4.name)[1:] == expected
    page = (report / "report.html").read_text()
    assert "How much smaller: claimed and measured" in page
    assert all(f">{cell}<" in page for cell in expected if "MB" not in cell)


def test_an_older_record_says_what_it_knows(report: Path) -> None:
    cells = row(report, "How much smaller: claimed and measured", INT8.name)[1:]
    assert cells == ["4.0 ×", "9.00", "3.6 ×", "1.8 ×", "–", "–", "–", "–", "–", "900.0 MB"]


def test_parts_add_up_and_layers_have_a_row_each(report: Path) -> None:
    parts = pd.read_csv(next((report / "tables").glob("*_size_parts.csv"))).set_index("experiment").loc[NF4.name]
    counted = parts.drop(["total_bytes", "weights"])
    assert counted.sum() == parts.total_bytes
    assert counted.codes == WEIGHTS / 2
    assert counted.scales == counted.offsets == WEIGHTS / 16
    layers = pd.read_csv(next((report / "tables").glob("*_bits_by_layer.csv")))
    assert list(layers.bits_per_weight) == [5.0] * 48
    assert layers.relative_error.is_monotonic_increasing
