"""Do predictions made before training hold for the trained model: what low bits cost layers, what ranks bring sites?

For finished float LoRA runs: what `adaptive_bits` would have predicted at their start, against what is measured on the
trained model with its own head, on validation images:

    bits    KL between its predictions and those with one layer quantized (int2, int4)
    ranks   KL between its predictions and those without one site's update

Spearman's rho over layers and sites, for each run; for comparison that of the plain squared error of the weights.

    .venv/bin/python -m experiments.calibration.scripts.bit_sensitivity RUN_DIR... [--images 64]
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from torch.nn import functional as F

from peft_vit.base.statistics import spearman
from peft_vit.core.adapters import adapted_modules, merged_state_dict
from peft_vit.core.allocation.loss_prediction import LinearHead, fit_head, layer_losses, rank_gains
from peft_vit.core.backbones import find_sites, load_run_backbone
from peft_vit.core.quantization import QuantizationFormat, quantize
from peft_vit.core.training import Calibration, RuntimeConfig
from peft_vit.data import load_data
from peft_vit.deploy.restore import restore_run

TYPES = ("int2", "int4")
GROUP = 32


def check(run_dir: Path, images: int) -> dict[str, float]:
    """Return the rank correlations of one run."""
    run = restore_run(run_dir)
    spec = run.record.spec
    backbone, trained = (load_run_backbone(spec, len(run.record.class_names)).model for _ in range(2))
    trained.load_state_dict(merged_state_dict(run.model))
    data = load_data(spec.data, spec.seed)
    runtime = RuntimeConfig(torch.device("cpu"), "fp32", run.backbone.mean, run.backbone.std)
    batch, labels = Calibration(data, runtime, spec.seed).batch(images)
    held_out, _ = next(data.validation.ordered_batches(images, run.backbone.mean, run.backbone.std))
    formats = [QuantizationFormat(one, GROUP, True, torch.float16) for one in TYPES]
    sites = find_sites(backbone)
    layers = dict.fromkeys(dict.fromkeys(site.module for site in sites), formats)
    head, places = fit_head(backbone, batch, labels)
    own = LinearHead(trained.head.weight.detach(), trained.head.bias.detach())
    truth = layer_losses(trained, layers, held_out, own, by="loss", seed=0)
    predicted = {by: layer_losses(backbone, layers, batch, head, by=by, seed=spec.seed) for by in ("fisher", "loss")}
    predicted["squared error"] = {
        name: [float((quantize(weight, one).dequantize() - weight).square().sum()) for one in formats]
        for name in layers
        for weight in [backbone.get_submodule(name).weight.detach()]
    }
    found = {
        f"{type}: {by}": spearman([row[place] for row in losses.values()], [row[place] for row in truth.values()])
        for place, type in enumerate(TYPES)
        for by, losses in predicted.items()
    }
    removed = without_each(trained, run.model, sites, held_out)
    for pool in (1, GROUP):
        gains = rank_gains(backbone, sites, batch, places, head, pool=pool)
        rank = run.record.spec.experiment.lora.rank
        found[f"rank {rank}, groups of {pool}"] = spearman([gain[rank] for gain in gains.values()], removed)
    return found


@torch.no_grad()
def without_each(trained, adapted, sites, images) -> list[float]:
    """Return the KL of leaving out each site's update."""
    trained.eval()
    target, modules, found = trained(images).log_softmax(1), dict(adapted_modules(adapted)), []
    for site in sites:
        rows = trained.get_submodule(site.module).weight[slice(*site.rows)]
        update = dict(modules[site.module].adapters())[site].delta()
        rows -= update
        found.append(float(F.kl_div(trained(images).log_softmax(1), target, reduction="batchmean", log_target=True)))
        rows += update
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", nargs="+", type=Path)
    parser.add_argument("--images", type=int, default=64)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for run_dir in arguments.runs:
        print(json.dumps({"run": str(run_dir), **check(run_dir, arguments.images)}), flush=True)
