"""Limits of bytes, latency and memory: what keeps within them, found before anything is trained."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from peft_vit.base.errors import UserError
from peft_vit.core.backbones import Architecture, architecture_of
from peft_vit.core.config import study_from_mapping
from peft_vit.deploy.page.formatting import joined
from peft_vit.fit.context import TuningContext
from peft_vit.fit.recipe import Recipe
from peft_vit.runs.machine import cpu_count
from peft_vit.runs.scheduling.plan import plan_study
from peft_vit.runs.scheduling.profiling import measure_step

MEMORY_LIMIT = "--memory-limit"
TimeExport = Callable[[Architecture, int, Sequence[str], int], float]  # see `time_random`


def within_bytes(context: TuningContext, forms: Mapping[Recipe, int]) -> dict[str, list[int]]:
    """Return the sizes of each model at which some form keeps within the limit; 2 bits alone do if no size has more.

    Raises:
        UserError: if none does, with the least that would do.
    """
    limit = math.inf if context.request.max_bytes is None else context.request.max_bytes
    best, found = defaultdict[str, dict[int, int]](dict), dict[str, list[int]]()
    for form, size in forms.items():  # sizes in pixels by what keeps within: nothing, 2 bits alone, more
        own = 0 if size > limit else 1 if form.bits == "int2" else 2
        best[form.model][form.image_size] = max(own, best[form.model].get(form.image_size, 0))
    for model, by_size in best.items():
        if kept := [size for size, own in by_size.items() if own == max(by_size.values()) > 0]:
            found[model] = kept
        if left := [f"{size} px" for size in by_size if size not in kept]:
            context.state.tell(f"  {model} at {joined(left)}: left out, more than --max-bytes, but for 2 bits at most")
    if not found:
        least = min(forms, key=forms.__getitem__)
        raise UserError(
            f"{round(limit / 1e5) / 10:g} MB is less than any model here takes; the least that would do is "
            f"{math.ceil(forms[least] / 1e5) / 10:g} MB, {least.bits or 'float'} weights of {least.model}",
            field="--max-bytes",
        )
    return found


def within_latency(
    context: TuningContext, sizes: Mapping[str, list[int]], time_export: TimeExport
) -> dict[str, list[int]]:
    """Return the sizes of each model at which an exported one is fast enough, by its architecture with any weights.

    The largest is timed; of the others those that multiply so much less that they should be fast enough, from the
    largest down until one is.

    Raises:
        UserError: if none is at any size, with the least that would do.
    """
    limit_s = context.request.max_latency
    if limit_s is None:
        return {model: list(own) for model, own in sizes.items()}
    found, timed = dict[str, list[int]](), list[tuple[float, str, int]]()
    for model, own in sizes.items():
        architecture = architecture_of(context.backbones[model])
        products = {size: context.shape(model, size).multiply_adds for size in own}
        pace = 0.0  # seconds a product, at the fastest size so far
        for size in sorted(own, reverse=True):
            if size > min(own) and pace * products[size] > limit_s:
                continue
            time = partial(time_export, architecture, size, context.seen.class_names, cpu_count())  # as what is left is
            seconds = context.state.once(f"latency {model} {size}", time)
            context.state.tell(f"  {model} at {size} px: {1000 * seconds:.1f} ms an image")
            timed.append((seconds, model, size))
            pace = seconds / products[size]
            if seconds <= limit_s:
                found[model] = [other for other in own if other <= size]
                break
    if not found:
        seconds, model, size = min(timed)
        raise UserError(
            f"{1000 * limit_s:g} ms is less than any model here takes; the least that would do is "
            f"{math.ceil(1000 * seconds)} ms, {model} at {size} px",
            field="--max-latency",
        )
    return found


def within_memory(context: TuningContext, model: str, image_size: int, experiment: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of training that keep within the limit of memory, measured on float LoRA, which takes most.

    Raises:
        UserError: naming `--memory-limit` if none does, with the least that would do.
    """
    limit = context.request.memory_limit
    if limit is None:
        return {}
    limited = {**experiment, "training": {**experiment["training"], "memory_limit": limit}}
    study = context.study("memory", model, image_size, [0], [limited])

    def decide() -> dict[str, Any]:
        plan = plan_study(
            study_from_mapping(study, file=context.request.images),
            context.state.studies,
            file=None,
            measure_step=partial(measure_step, log=lambda text: context.state.tell(f"  {text}")),
        )
        for line in plan.memory:
            context.state.tell(f"  {line}")
        settings = {"activation_checkpointing", "recomputed_blocks", "micro_batch_size"}
        training = plan.study.experiments[0].training
        return {"memory_limit": limit, **training.model_dump(include=settings, exclude_none=True)}

    try:
        return context.state.once(f"memory {model} {image_size}", decide)
    except UserError as error:
        if error.field is None or not error.field.endswith("memory_limit"):
            raise
        raise UserError(error.message, field=MEMORY_LIMIT) from None
