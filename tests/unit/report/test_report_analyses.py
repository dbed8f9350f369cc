"""What tables and lines of a report say, of splits and intervals too, where seeds share test images and where not."""

from __future__ import annotations

from collections.abc import Iterable

import planted
import pytest
from golden import check_golden

from peft_vit.core.records import RunRecord
from peft_vit.deploy.page.document import SECTION_TITLES, Block, Paragraph, Table
from peft_vit.lab.analysis import Analysis, analyze
from peft_vit.lab.report import summary
from peft_vit.lab.report.build import study_documents
from peft_vit.lab.report.figures import accuracy_by_method
from peft_vit.lab.report.study_tables import quantization_tables

EXPERIMENTS = planted.experiments()
NF4, INT8 = (EXPERIMENTS[name] for name in ("qa_lora_4bit_nf4_constant", "qa_lora_8bit_int8_linear"))


def analysis_of(records: list[RunRecord]) -> Analysis:
    return analyze(planted.study_of(records))


def blocks_of(records: list[RunRecord]) -> list[Block]:
    (document,) = study_documents([analysis_of(records)])
    return [block for title in SECTION_TITLES for block in document.sections[title]]


def tables(blocks: Iterable[Block]) -> dict[str, Table]:
    return {block.slug: block for block in blocks if isinstance(block, Table)}


def as_text(block: Block) -> str:
    if not isinstance(block, Table):
        return f"{block.text}\n" if isinstance(block, Paragraph) else ""
    lines = [f"{block.slug}: {block.title}", *map(" | ".join, (block.columns, *block.rows)), block.note]
    columns = dict.fromkeys(name for row in block.data for name in row)
    return "\n".join([*lines, f"CSV: {len(block.data)} rows of {', '.join(columns)}", ""])


def test_what_every_table_says_and_which_columns_its_file_has() -> None:
    """Of every method with two seeds; `test_report_numbers` computes what the files hold a second time."""
    names = ("linear_probe", "lora_r8", "adalora_proportional_magnitude", "adalora_top_k_fisher", NF4.name, INT8.name)
    records = [record for record in planted.quickstart() if record.spec.experiment.name in names]
    check_golden("report_tables.txt", "\n".join(filter(None, map(as_text, blocks_of(records)))))


def test_claimed_and_measured_sizes_stand_side_by_side_and_older_records_say_what_they_know() -> None:
    old = planted.record(INT8, 0, 0.8)
    assert old.quantization is not None
    older = {"quantization": old.quantization.model_copy(update={"size": None}), "bits_history": []}
    impacts = analysis_of([planted.record(NF4, 0, 0.8), planted.record(INT8, 0, 0.8, changes=older)]).quantization
    made, weights = tables(quantization_tables(impacts)), 21_233_664  # of the quantized layers
    total = weights * 5 / 8 + planted.LEFT_IN_FLOAT + 3080
    bits = 8 * total / (planted.BACKBONE_PARAMETERS + 770)
    model = (f"{bits:.2f}", f"{32 / bits:.1f} ×", f"{16 / bits:.1f} ×")
    stored = (f"{total / 1e6:.1f} MB", f"{(total + 9000) / 1e6:.1f} MB", "900.0 MB")
    assert made["size"].rows == (
        (NF4.name, "8.0 ×", "5.00", "6.4 ×", "3.2 ×", *model, *stored),
        (INT8.name, "4.0 ×", "9.00", "3.6 ×", "1.8 ×", "–", "–", "–", "–", "–", "900.0 MB"),
    )
    layers = [row for row in made["bits_by_layer"].data if row["experiment"] == NF4.name]
    assert [row["bits_per_weight"] for row in layers] == [5.0] * 48
    errors = [row["relative_error"] for row in layers]
    assert errors == sorted(errors)


MAJORITY = {0: 0.685, 1: 0.682, 2: 0.69}  # a mean of 0.6857
REACHED = {"linear_probe": 0.75, "lora_r8": 0.80}


def splits_of(test_split: str, train_subset: str = "fixed") -> Analysis:
    """Return two experiments over three seeds; with per_seed, splits and majorities differ by seed."""
    differs = test_split == "per_seed"
    records: list[RunRecord] = []
    for name, accuracy in REACHED.items():
        for seed, majority in MAJORITY.items():
            changes = {"majority_accuracy": {"test": majority if differs else 0.685}}
            split = {"split_sha256": f"{seed:064x}"} if differs else {}
            record = planted.record(
                planted.experiments()[name], seed, accuracy, changes=changes, provenance_changes=split
            )
            data = record.spec.data.model_copy(update={"test_split": test_split, "train_subset": train_subset})
            records.append(planted.asking(record, data=data))
    return analyze(planted.study_of(records))


def test_what_seeds_draw_and_intervals_cover_is_told() -> None:
    parts = []
    for drawn in (("fixed",), ("fixed", "per_seed"), ("per_seed",)):
        analysis = splits_of(*drawn)
        facts = dict(summary.facts(analysis.study))
        figure = accuracy_by_method(analysis.study, analysis.methods)
        majority = figure.svg[figure.svg.index("majority class") :].split("<")[0]
        texts = (*summary.how_sure(analysis), *summary.not_shown(analysis.study), figure.caption, majority)
        parts.append("\n".join([f"## {' '.join(drawn)}", facts["Split"], facts["Classes"], *texts]))
    check_golden("report/splits.md", "\n\n".join(parts) + "\n")


def test_the_figure_of_accuracies_and_pairs_have_each_seeds_majority() -> None:
    per_seed = splits_of("per_seed")
    rows = {
        (row["seed"], row["majority_accuracy"]) for row in accuracy_by_method(per_seed.study, per_seed.methods).data
    }
    assert rows == set(MAJORITY.items())
    (comparison,) = [c for c in per_seed.comparisons if c.reference == "linear_probe"]
    assert list(comparison.by_seed.values()) == pytest.approx([0.05] * 3, abs=1 / planted.N_TEST)
    assert comparison.note == ""
    assert {m.experiment.name: m.above_majority.estimate for m in per_seed.methods} == pytest.approx(
        {name: sum(accuracy - share for share in MAJORITY.values()) / 3 for name, accuracy in REACHED.items()},
        abs=1 / planted.N_TEST,
    )
