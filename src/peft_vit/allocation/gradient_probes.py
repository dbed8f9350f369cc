"""Scores for sites without rank, from the gradient on temporary triplets.

A site at rank 0 has no triplet that could be scored, and |w dL/dw| of a triplet that changes nothing is 0 whatever the
site is worth. What can be measured is the gradient that its weight would receive: an `adapters.GradientProbe` estimates
g, the root mean square over the elements of dL/dW. It is turned into the metric's units by the sites that have both:

    score_s = g_s^k * median over sites t with measured triplets of (score_t / g_t^k)

with k the power of the gradient that the metric holds: 2 for `fisher` and `sensitivity` (a product of two smoothed
|w dL/dw|), else 1. So a site without rank scores as a middling one with rank would whose gradient is as large. The
median, for ratios are far apart under metrics that know more than the gradient's size: where weights have grown along
the gradient, sensitivity is high for its g. A mean would credit all others with what a few such sites have learned, and
a noisy site that lost its rank would come back above them. The ratio does not depend on the loss's scale. All sites are
probed, for g_t must come from the same batch and be as noisy.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping

import torch

from peft_vit.adapters import Adapter, GradientProbe, SiteAdapter
from peft_vit.config import METRICS, Metric
from peft_vit.seeding import torch_generator

PROBE_TRIPLETS = 4  # the estimate of a squared norm from n random directions has a relative error of sqrt(2 / n)


def attach_probes(adapters: Mapping[str, Adapter], *, seed: int, step: int) -> None:
    """Put temporary triplets on every site for the forward and backward pass of one step.

    Their directions follow from seed and step alone, so that a resumed run draws the same. A model that PEFT has
    wrapped gets none.
    """
    generator = torch_generator(seed, "probe", step)
    for adapter in adapters.values():
        if isinstance(adapter, SiteAdapter):
            adapter.probe = GradientProbe(
                adapter.in_features // adapter.pool,
                adapter.out_features,
                PROBE_TRIPLETS,
                generator=generator,
                device=adapter.lora_A.device,
            )


def take_probes(adapters: Mapping[str, Adapter]) -> tuple[dict[str, float], int]:
    """Remove the probes.

    Returns:
        The size of the gradient g by site, of those that a backward pass has reached, and the temporary values held.
        Nothing if a gradient is not finite: a loss scale was too large then, or the training diverges.
    """
    gradients, values = {}, 0
    for name, adapter in adapters.items():
        if adapter.probe is None:
            continue
        gradient = adapter.probe.gradient()
        if gradient is not None:
            gradients[name] = gradient
            values += adapter.probe.values
        adapter.probe = None
    sizes = torch.stack(list(gradients.values())).tolist() if gradients else []
    if not all(math.isfinite(size) for size in sizes):
        return {}, 0
    return dict(zip(gradients, sizes, strict=True)), values


def probed_scores(
    metric: Metric, gradients: Mapping[str, float], measured: Mapping[str, float], sought: Iterable[str]
) -> dict[str, float]:
    """Return the scores of the sought sites by the formula above.

    Args:
        metric: what is scored.
        gradients: g of every site, from `take_probes`.
        measured: scores of sites from their own triplets in the same backward pass.
        sought: sites without rank. They get no score if no measured site has a gradient to set theirs in relation to.
    """
    power = METRICS[metric].probe_power
    assert power is not None
    sizes = {name: size**power for name, size in gradients.items()}
    ratios = [score / sizes[name] for name, score in measured.items() if sizes.get(name)]
    if not ratios:
        return {}
    ratio = statistics.median(ratios)
    return {name: sizes[name] * ratio for name in sought if name in sizes}
