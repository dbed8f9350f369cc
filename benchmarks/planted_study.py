"""A thousand planted records, shaped like those of a ViT-S: 20 experiments x 50 seeds, 72 sites, scores and ranks."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from peft_vit.core.config import ExperimentConfig
from peft_vit.core.records import RunRecord
from peft_vit.runs.records.storage import write_record

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import planted

_ADALORA = {"total_rank_budget": 288, "update_frequency": 6, "warmup_steps": 12}
_QA_LORA = {"quantization_schedule": "constant", "gradient_scaling_factor": 1.0, "rank": 8}


def experiments() -> list[ExperimentConfig]:
    """Return 20 experiments of every method that a planted record can be made for."""
    sections: list[dict[str, Any]] = [
        {"name": "linear_probe", "method": "linear"},
        {"name": "full_finetuning", "method": "full"},
        *({"name": f"lora_r{rank}", "method": "lora", "lora": {"rank": rank}} for rank in (1, 2, 4, 8, 16, 32)),
        *(
            {
                "name": f"adalora_{strategy}_{metric}",
                "method": "adalora",
                "adalora": {**_ADALORA, "allocation_strategy": strategy, "importance_metric": metric},
            }
            for strategy in ("proportional", "threshold", "top_k")
            for metric in ("magnitude", "sensitivity")
        ),
        *(
            {
                "name": f"qa_lora_{kind}_{'grouped' if grouped else 'whole'}",
                "method": "qa_lora",
                "qa_lora": {
                    **_QA_LORA,
                    "quantization_bits": bits,
                    "quantization_type": kind,
                    "use_group_quantization": grouped,
                },
            }
            for bits, kind in ((4, "nf4"), (4, "fp4"), (8, "int8"))
            for grouped in (True, False)
        ),
    ]
    return list(planted.configuration(sections).experiments)


def records(seeds: int) -> Iterator[RunRecord]:
    """Yield every run's record: experiments differ by up to four points, seeds by two."""
    rng = np.random.default_rng(11)
    for place, experiment in enumerate(experiments()):
        for seed in range(seeds):
            accuracy = 0.76 + 0.04 * place / 19 + 0.02 * seed / seeds + 0.005 * rng.normal()
            yield planted.record(experiment, seed, float(accuracy), study="thousand")


def write(folder: Path, seeds: int) -> int:
    """Write a study, and return its number of runs."""
    return len([write_record(folder, record) for record in records(seeds)])
