"""Rows of the study are what the package exports and scores; verdicts and tables follow the rows, as by hand."""

from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
import scipy
from written_runs import plan_of, run_and_write, tiny_study

from experiments.during_or_after.scripts import during_or_after as study
from experiments.scripts import evidence
from peft_vit.core.config import load_study
from peft_vit.deploy import open_exported
from peft_vit.deploy.export import export_run_to_file
from peft_vit.deploy.restore import restore_run
from peft_vit.runs.records.storage import run_folder


def test_the_configurations_are_those_of_the_script() -> None:
    assert study.configurations() == {file.name: file.read_text() for file in study.CONFIGS.glob("*.yaml")}


def test_pilot_and_study_share_no_seed_with_each_other_or_with_other_studies() -> None:
    own, others = {*study.PILOT_SEEDS, *study.SEEDS}, set()
    for file in evidence.study_files():
        if file.parent != study.CONFIGS:
            others |= set(load_study(file).seeds)
    assert len(own) == len(study.PILOT_SEEDS) + len(study.SEEDS)
    assert not own & others


@pytest.mark.usefixtures("cache")
@pytest.mark.parametrize("method", ["lora", "nf4"])
def test_an_arm_is_what_the_same_runs_export_says(tmp_path, images, method) -> None:
    (run,) = plan_of(tiny_study(method, images=images), tmp_path).runs
    record = run_and_write(run.spec, tmp_path)
    run_dir = run_folder(tmp_path, record.spec)
    ways = study.ROUNDED if method == "lora" else ()
    rows = pd.DataFrame(study.rows_of(record, run_dir, ways)).set_index("experiment")
    assert sorted(rows.index) == sorted([method, *(after.name for after in ways)])
    restored = restore_run(run_dir)
    tested = restored.load_data().test.open()
    pixels = next(tested.ordered_batches(len(tested), restored.card.mean, restored.card.std))[0].numpy()
    of_seeds = evidence.right_images(rows.reset_index())
    named = {after.name: after for after in study.ROUNDED if not after.offset}
    for name in rows.index.intersection([method, *named]):
        file, arm = tmp_path / f"{name}.safetensors", named.get(name)
        export_run_to_file(run_dir, file, "safetensors", bits=arm and arm.type, rounding=arm and arm.rounding)
        right = open_exported(file).logits(pixels).argmax(1) == tested.labels
        np.testing.assert_array_equal(of_seeds[name].loc[0], right)
        assert rows.test_accuracy[name] == pytest.approx(right.mean())
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert rows.merged_bytes[name] == pytest.approx(file.stat().st_size - header, abs=64)
    if method == "lora":
        more, less = rows.merged_bytes["after_int3_gptq_offset"], rows.merged_bytes["after_int3_gptq"]
        assert more > less


def made_up(accuracies: dict[str, float], images: str, seeds: int = 6) -> pd.DataFrame:
    rng, rows = np.random.default_rng(len(images)), []
    for seed in study.SEEDS[:seeds]:
        luck = rng.random(300)
        for name, accuracy in accuracies.items():
            right = luck + 0.02 * rng.standard_normal(300) < accuracy
            row = {"study": f"during_or_after_{images}", "experiment": name, "seed": seed, "seconds": 30.0}
            row |= {"test_accuracy": right.mean(), "training_bytes": 1.4e8, "merged_bytes": 1e7, "scoring_seconds": 5.0}
            rows.append({**row, "commit": "abc", **evidence.right(right, [True] * 300)})
    return pd.DataFrame(rows)


ACCURACIES = {
    "lora": 0.9,
    "during_nf4": 0.9,
    "after_nf4_nearest": 0.9,
    "during_int3": 0.9,
    "after_int3_gptq": 0.6,
    "after_int3_gptq_offset": 0.89,
    "during_int2": 0.88,
    "after_int2_gptq": 0.5,
}


def test_verdicts_follow_the_rows() -> None:
    rows = pd.concat([made_up(ACCURACIES, images) for images in study.SETS])
    right = study.sets_of(rows)["digits"]
    said = {sentence: verdict for sentence, (verdict, _, _) in study.decided(right).items()}
    eight, _, three, two = (hypothesis.sentence for hypothesis in study.HYPOTHESES)
    assert said[two] == "supported"
    assert said[three] != "supported"  # against the better of both ways it is no point
    assert said[eight] == "not decided"
    assert "no look so far" in study.verdicts(rows).splitlines()[2]
    wide = rows[rows.study.str.endswith("digits")].pivot(index="seed", columns="experiment", values="test_accuracy")
    by_seed = 100 * (wide.during_int2 - wide.after_int2_gptq)
    low, high = scipy.stats.ttest_1samp(by_seed, 0).confidence_interval()
    found = study.estimate([right], study.HYPOTHESES[3])
    assert (found.mean, found.of_seeds) == pytest.approx((by_seed.mean(), (high - low) / 2))
    few = study.sets_of(rows[rows.seed < study.SEEDS[5]])["digits"]
    assert {verdict for verdict, _, _ in study.decided(few).values()} == {"not decided"}  # before the first look


def test_tables_and_figure_hold_what_the_rows_do() -> None:
    rows = pd.concat([made_up(ACCURACIES, images) for images in study.SETS])
    table = study.arm_table(rows)
    mean = 100 * rows[(rows.experiment == "lora") & rows.study.str.endswith("digits")].test_accuracy.mean()
    assert f"| `lora` | {mean:.1f} ±" in table
    assert {entry["name"] for entry in study.drawing(rows).data} == set(ACCURACIES)
    assert "seeds: digits 6, Fashion-MNIST 6" in study.costs(rows)
    begun = rows[rows.study.str.endswith("digits") & (rows.seed < study.SEEDS[2])]
    assert study.verdicts(begun).count("no look so far") == 2 * len(study.HYPOTHESES)
    (first, *_), heads = study.during_after(begun), ("during", "after")
    assert first == ("during_nf4", "after_nf4_nearest")
    (line,) = study.contrasts(begun, [first], heads).splitlines()[2:]
    assert line.endswith("| – |")
    wide = begun.pivot(index="seed", columns="experiment", values="test_accuracy")
    gap = 100 * (wide.during_nf4 - wide.after_nf4_nearest).mean()
    assert f"| {gap:+.1f} ±" in line
    assert {entry["set"] for entry in study.drawing(begun).data} == {"digits"}


def test_a_whole_pilot_chooses_rates_and_none_at_an_end(tmp_path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [
        {
            "study": "during_or_after_digits_pilot",
            "experiment": f"{name if name == 'lora' else f'during_{name}'}_rate{place}",
            "learning_rate": rate,
            "validation_accuracy": 0.5 + place / 10,
            "seed": seed,
        }
        for seed in study.PILOT_SEEDS
        for name, rates in study.RATES.items()
        for place, rate in enumerate(rates)
    ]
    monkeypatch.setattr(study, "PILOT_ROWS", tmp_path / "pilot.csv")
    pd.DataFrame(rows[1:]).to_csv(study.PILOT_ROWS)
    assert set(study.chosen_rates("digits").values()) == {1e-3}  # of a pilot that is not whole
    assert "**" not in study.rates_table()
    pd.DataFrame(rows).to_csv(study.PILOT_ROWS)
    with pytest.raises(study.UserError, match=r"lora: 0\.003 is at an end"):
        study.chosen_rates("digits")
    for row in rows:
        row["validation_accuracy"] = 0.8 if row["learning_rate"] == 1e-3 else 0.5
    pd.DataFrame(rows).to_csv(study.PILOT_ROWS)
    assert set(study.chosen_rates("digits").values()) == {1e-3}
    assert "| digits | `lora` | 50.0 | **80.0** | 50.0 | – |" in study.rates_table()
    more = study.configuration("digits", "more", study.chosen_rates("digits"))
    assert [one["name"] for one in more["experiments"]] == ["during_int8"]


def test_the_document_says_what_results_hold() -> None:
    text = study.DOCUMENT.read_text()
    assert evidence.filled(text, dict(study.tables())) == text, "run experiments/during_or_after/scripts"
