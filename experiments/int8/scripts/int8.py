"""Whether training in int8 loses accuracy to float: three data sets, 7 bits in place of 8, and few labels.

    .venv/bin/python -m experiments.int8.scripts.int8 run experiments/outputs/int8
    .venv/bin/python -m experiments.int8.scripts.int8 keep experiments/outputs/int8

`run` does what is not done yet: the studies in configs/; these again with integers of 7 bits, as where products of 8
are not exact (oneDNN is told that the processor has no VNNI); and 4, 12 and 50 labels a class with LoRA, three draws.
`keep` puts a row a run into results/int8.csv and the tables into docs/int8.md; without an argument tables alone are
made anew.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.scripts import evidence
from peft_vit import cli
from peft_vit.base.files import write_atomically
from peft_vit.base.statistics import mean_interval, noninferiority
from peft_vit.core.config.from_yaml import read_mapping
from peft_vit.runs.records.scan import read_records

FOLDER = Path(__file__).resolve().parents[1]
ROWS, DOCUMENT = FOLDER / "results" / "int8.csv", FOLDER / "docs" / "int8.md"
SETS = {"elpv": "ELPV", "digits": "digits", "fashion": "Fashion-MNIST"}
METHODS = {"lora": "LoRA r=8", "int4": "QA-LoRA int4, r=8"}
SHOTS, DRAWS, FEW_STEPS = (4, 12, 50), range(410, 413), 96
MARGIN = 1.0  # points
NO_VNNI = {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}


def studies() -> dict[str, tuple[dict[str, Any], dict[str, str]]]:
    """Return each study's configuration and environment, by name."""
    declared = {name: read_mapping(FOLDER / "configs" / f"int8_{name}.yaml")[0] for name in SETS}
    found: dict[str, tuple[dict[str, Any], dict[str, str]]] = {f"int8_{name}": (declared[name], {}) for name in SETS}
    for name, study in declared.items():
        experiments = {experiment["name"]: experiment for experiment in study["experiments"]}
        seven = [{**experiments[f"{method}_int8"], "name": f"{method}_7bit"} for method in METHODS]
        title = f"int8_{name}_7bit"
        found[title] = ({**study, "name": title, "experiments": seven}, NO_VNNI)
    for name, study in declared.items():
        experiments = {experiment["name"]: experiment for experiment in study["experiments"]}
        for shots in SHOTS:
            data = {key: value for key, value in study["data"].items() if key != "train_images"}
            training = {key: value for key, value in study["training"].items() if key != "epochs"}
            title = f"int8_{name}_{shots}"
            found[title] = (
                {
                    **study,
                    "name": title,
                    "seeds": list(DRAWS),
                    "data": {**data, "shots_per_class": shots},
                    "training": {**training, "steps": FEW_STEPS, "validate_every": FEW_STEPS // 3},
                    "experiments": [experiments["lora_float"], experiments["lora_int8"]],
                },
                {},
            )
    return found


def run(folder: Path) -> None:
    """Do every run that is not done yet."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, (content, environment) in studies().items():
        file = folder / f"{name}.yaml"
        file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
        command = [sys.executable, "-m", "peft_vit.cli", "run", str(file), "--output", str(folder)]
        subprocess.run(command, check=True, env=os.environ | environment)


def keep(folder: Path) -> None:
    """Put a row a run into results/."""
    rows = []
    for record in read_records(folder):
        method, _, form = record.spec.experiment.name.rpartition("_")
        if record.status == "done" and record.test and record.provenance and method in METHODS:
            rows.append(
                {
                    "study": record.spec.study,
                    "experiment": record.spec.experiment.name,
                    "data": record.spec.study.split("_")[1],
                    "shots": record.spec.data.shots_per_class,
                    "method": method,
                    "form": form,
                    "bits": record.provenance.integer_bits,
                    "seed": record.spec.seed,
                    "test_accuracy": record.test.accuracy,
                    "nll": record.test.nll,
                    "seconds": round(record.seconds, 1),
                    "processor": record.provenance.processor,
                    "commit": (record.provenance.git_hash or "")[:12],
                }
            )
    present = ROWS.read_text(encoding="utf-8") if ROWS.exists() else None
    write_atomically(ROWS, evidence.merge(present, pd.DataFrame(rows)).encode())


def comparisons(rows: pd.DataFrame) -> pd.DataFrame:
    """Return a row a data set, number of labels, method and form: accuracy of both in percent, and differences."""
    compared = []
    few = rows.shots.notna()
    for (data, shots, method), part in rows.assign(shots=rows.shots.where(few, 0)).groupby(["data", "shots", "method"]):
        wide = 100 * part.pivot(index="seed", columns="form", values="test_accuracy")
        for form in ("int8", "7bit"):
            if form in wide and not (pair := wide[["float", form]].dropna()).empty:
                entry = {"data": data, "shots": int(shots), "method": method, "form": form, "pairs": len(pair)}
                entry |= {"float": pair["float"].mean(), "integer": pair[form].mean()}
                compared.append({**entry, "differences": (pair[form] - pair["float"]).to_numpy()})
    return pd.DataFrame(compared)


def tables() -> dict[str, str]:
    """Return the tables of the page."""
    rows = pd.read_csv(ROWS)
    compared = comparisons(rows)
    order = {name: place for place, name in enumerate(SETS)}
    compared = compared.sort_values(["data", "method", "form"], key=lambda c: c.map(order) if c.name == "data" else c)
    full = [row for _, row in compared[compared.shots == 0].iterrows()]
    few = [row for _, row in compared[compared.shots > 0].sort_values(["shots"], kind="stable").iterrows()]

    def shown(row: pd.Series) -> str:
        interval = mean_interval(row.differences)
        return "yes" if interval.low is not None and interval.low > -MARGIN else "no"

    columns = {
        "images": lambda row: SETS[row.data],
        "method": lambda row: METHODS[row.method],
        "integers": lambda row: {"int8": "8 bits", "7bit": "7 bits"}[row.form],
        "seeds": lambda row: str(row.pairs),
        "float, %": lambda row: f"{row.float:.2f}",
        "integers, %": lambda row: f"{row.integer:.2f}",
        "difference, points": lambda row: evidence.interval(mean_interval(row.differences)),
        "p": lambda row: evidence.p(noninferiority(row.differences, MARGIN).p_value),
        "loses less than a point": shown,
    }
    of_few = {
        "images": columns["images"],
        "labels a class": lambda row: str(row.shots),
        **{name: columns[name] for name in ("seeds", "float, %", "integers, %")},
        "difference, points (sd)": lambda row: f"{row.differences.mean():+.2f} ({row.differences.std(ddof=1):.2f})",
    }
    return {"int8": evidence.table(full, columns, left=3), "int8_few": evidence.table(few, of_few)}


def main() -> None:
    """Run, keep, or make the tables anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "keep"], help="left out: only the tables are made anew")
    parser.add_argument("folder", nargs="?", type=Path, help="where the runs are")
    request = parser.parse_args()
    if request.what is not None and request.folder is None:
        parser.error(f"{request.what} needs the folder of the runs")
    with cli.user_errors():
        if request.what == "run":
            run(request.folder)
            return
        if request.what == "keep":
            keep(request.folder)
        text = evidence.filled(DOCUMENT.read_text(encoding="utf-8"), tables())
        write_atomically(DOCUMENT, text.encode())
        print(DOCUMENT)


if __name__ == "__main__":
    main()
