"""What accumulating importance costs a training step: milliseconds per update on the 72 sites of ViT-S at rank 8.

    python benchmarks/importance_cost.py

Gradients are random; no training. Each metric is timed in both parametrizations, with one thread and with two.
`controller` adds what the controller does around the tracker: finding the sites in the module tree, means by site.
"""

from __future__ import annotations

from common import machine, with_tuned_allocator, write

with_tuned_allocator()

import statistics  # noqa: E402 - torch must be loaded under the tuned allocator
import time  # noqa: E402
from collections.abc import Callable  # noqa: E402
from typing import Any, get_args  # noqa: E402

import timm  # noqa: E402
import torch  # noqa: E402
from torch import nn  # noqa: E402

from peft_vit.core.adapters import site_adapters  # noqa: E402
from peft_vit.core.allocation import AdaLoRAController, ImportanceTracker  # noqa: E402
from peft_vit.core.allocation.importance import weight_scores  # noqa: E402
from peft_vit.core.config import AdaLoraConfig, Metric  # noqa: E402

RANK, SITES, REPEATS, WARMUP = 8, 72, 200, 20


def milliseconds(call: Callable[[], Any]) -> dict[str, float]:
    """Return the median over many calls, and the smallest: what is left when nothing else runs on the machine."""
    times = []
    for _ in range(WARMUP + REPEATS):
        started = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - started))
    return {"median_ms": round(statistics.median(times[WARMUP:]), 3), "min_ms": round(min(times[WARMUP:]), 3)}


def model_with_gradients(metric: Metric, parametrization: str) -> tuple[nn.Module, AdaLoRAController]:
    """Return ViT-S with an adapter of rank 8 on each of its 72 sites, and a controller that never reallocates."""
    model = timm.create_model("vit_small_patch14_dinov2", img_size=84, num_classes=2)
    config = AdaLoraConfig(
        total_rank_budget=RANK * SITES,
        allocation_strategy="proportional",
        importance_metric=metric,
        budget_schedule="constant",
        warmup_steps=10**6,
        update_frequency=1,
        parametrization=parametrization,
    )
    controller = AdaLoRAController(model, config, total_steps=2 * 10**6)
    assert [adapter.rank for adapter in site_adapters(model).values()] == [RANK] * SITES
    with torch.no_grad():
        for adapter in site_adapters(model).values():
            for parameter in adapter.parameters():
                parameter.normal_()
                parameter.grad = torch.randn_like(parameter)
    return model, controller


def cost(metric: Metric, parametrization: str) -> dict[str, dict[str, float]]:
    """Time the tracker alone, and the controller's whole scoring."""
    model, controller = model_with_gradients(metric, parametrization)
    adapters = site_adapters(model)
    tracker = ImportanceTracker(
        metric,
        sensitivity_beta=0.85,
        uncertainty_beta=0.85,
        generator=torch.Generator().manual_seed(0),
        of_sites=weight_scores(model, metric),
    )
    steps = iter(range(1, 10**6))
    return {
        "tracker": milliseconds(lambda: tracker.update(adapters)),
        "controller": milliseconds(lambda: controller.update_importance_scores(model, next(steps))),
        "site_adapters": milliseconds(lambda: site_adapters(model)),
    }


def main() -> None:
    """Time every metric in both parametrizations."""
    rows = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        for parametrization in ("product", "svd"):
            for metric in get_args(Metric):
                parts = cost(metric, parametrization)
                rows.append({"threads": threads, "parametrization": parametrization, "metric": metric, **parts})
                found = "  ".join(f"{name} {t['median_ms']:6.3f} (min {t['min_ms']:.3f})" for name, t in parts.items())
                print(f"threads {threads}  {parametrization:7}  {metric:13}  ms: {found}", flush=True)
    setting = {"sites": SITES, "rank": RANK, "repeats": REPEATS}
    write("importance_cost", {"machine": machine(threads=2), "setting": setting, "rows": rows})


if __name__ == "__main__":
    main()
