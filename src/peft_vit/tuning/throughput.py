"""What runs take on this machine, measured once for a tuning, at two image sizes if there is time."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

from peft_vit.config import StudyConfig, study_from_mapping
from peft_vit.data import ImageIndex, open_index
from peft_vit.forecasting.estimate import Line, Throughput, Workload
from peft_vit.studies.plan import decide_precision, splits_of, workload_of
from peft_vit.studies.profiling import measure_throughput

NOT_MEASURED = "not measured"
_SHORTEST_S = 5e-5  # of a forward pass; less is rounded to nothing
MeasureThroughput = Callable[[StudyConfig, ImageIndex, Workload, float, Callable[[str], None]], Throughput]


def said_ms(seconds: float) -> str:
    """Return milliseconds as text; a machine that is too busy to measure them tells of events all at once."""
    return f"{1000 * seconds:.1f} ms" if seconds >= _SHORTEST_S else NOT_MEASURED


def throughput_of(kept: Mapping[str, Any]) -> Throughput:
    """Return what was kept as a plain value."""
    lines = {name: Line(**kept[name]) for name in ("step", "image")}
    return Throughput(**{**kept, **lines})


def measured(
    mapping: Mapping[str, Any],
    budget_s: float,
    tell: Callable[[str], None],
    measure: MeasureThroughput = measure_throughput,
) -> dict[str, Any]:
    """Return what a study's steps and forward passes take, as a plain value.

    Args:
        mapping: a study.
        budget_s: seconds that measuring takes at most.
        tell: told what is measured.
        measure: see `measure_throughput`.
    """
    study = study_from_mapping(dict(mapping), file=mapping["name"])
    study = study.model_copy(update={"precision": decide_precision(study, None).chosen})
    index = open_index(study.data)
    workload = workload_of(study, index, splits_of(index, study)[study.seeds[0]])
    return asdict(measure(study, index, workload, budget_s, tell))
