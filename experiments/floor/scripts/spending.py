"""What one budget of steps brings, spent on one training or on several whose updates are averaged.

    python -m experiments.floor.scripts.spending FOLDER 84 --budget 96

It takes what `trainings` has kept, and adds rows to `results/spending.csv` for each way whose trainings are there:

- `A`: one training with all images and the whole budget; `A/2`, which is also `D`: with half; `2A`: with twice that;
- `B`: three, each with two thirds of the images and a third of the budget; the mean of their updates and heads;
- `C`: three, with a sixth each, and one with all images and a half; the mean of all four; `D`: the last of them alone;
- `E`: likewise four of a quarter each;
- `B, one start`: `B` whose three trainings begin with the same factors;
- `A, four blocks`: `A` whose head reads the class tokens of the last four blocks;
- `B, rank 8` and so on: the mean's updates, cut to a rank; `B, times 1.73`:
  these updates, larger.

A mean is of matrices: of W + dW. NLL is with a temperature of 1, of 1.5 (the prior's), of what the images say that the
three left out, alone and with the prior, and with the best on test images.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from experiments.floor.scripts.images import RESULTS, Rows, measured, pretrained, runtime_of
from experiments.floor.scripts.sets import DRAWS, SETS
from experiments.floor.scripts.trainings import FOLDS, Draw, predicted
from peft_vit.base.statistics import fit_temperature
from peft_vit.core.backbones import Backbone, fill_head, find_sites
from peft_vit.runs.measures.held_out import PRIOR

_RANKS, _TIMES = (8, 16), (1.73,)
_NLL = ("nll_1", "nll_prior", "nll_held_out", "nll_held_out_prior", "nll_best")


class Way(NamedTuple):
    """How a budget is spent: parts of it on training with all images, and on each fold."""

    name: str
    whole: float = 0.0
    fold: float = 0.0
    takes_last: bool = False
    blocks: int = 1
    one_start: bool = False

    def files(self, draw: Draw, budget: int) -> list[Path]:
        """Return its trainings; the one with all images is the last."""
        draw = draw._replace(blocks=self.blocks, one_start=self.one_start)
        files = [draw.file(round(budget * self.fold), fold) for fold in range(FOLDS)] if self.fold else []
        return [*files, *([draw.file(round(budget * self.whole), None)] if self.whole else [])]


WAYS = (
    Way("A", 1),
    Way("B", 0, 1 / 3),
    Way("C", 1 / 2, 1 / 6),
    Way("D", 1 / 2, 1 / 6, takes_last=True),
    Way("E", 1 / 4, 1 / 4),
    Way("2A", 2),
    Way("A/4", 1 / 4),
    Way("B, one start", 0, 1 / 3, one_start=True),
    Way("A, four blocks", 1, blocks=4),
)


def mean_update(factors: list[tuple[Tensor, Tensor]]) -> tuple[Tensor, Tensor]:
    """Return factors of the mean of several updates, side by side."""
    left, right = zip(*factors, strict=True)
    return torch.cat(left, 1) / len(factors), torch.cat(right, 0)


def at_rank(left: Tensor, right: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """Return the nearest update of a rank, by a singular value decomposition of the factors' product."""
    (q, r), (p, s) = torch.linalg.qr(left), torch.linalg.qr(right.T)
    u, values, v = torch.linalg.svd(r @ s.T)
    return q @ u[:, :rank] * values[:rank], v[:rank] @ p.T


class Models:
    """The plain model of a draw, with updates put onto it."""

    def __init__(self, draw: Draw) -> None:
        self.draw = draw
        self.backbone = pretrained(draw.size, len(draw.train.classes))
        self.runtime = runtime_of(self.backbone)
        self.model: Any = self.backbone.model.requires_grad_(False).eval()
        self.sites = {site.name: site for site in find_sites(self.model)}
        state = self.model.state_dict()
        self.weights = {site.module: state[f"{site.module}.weight"].clone() for site in self.sites.values()}

    def logits(self, updates: dict[str, tuple[Tensor, Tensor]], head: tuple[Tensor, Tensor]) -> Any:
        """Return what the model with updates and a head says of test images."""
        for module, weight in self.weights.items():
            self.model.get_submodule(module).weight.copy_(weight)
        for name, (left, right) in updates.items():
            site = self.sites[name]
            self.model.get_submodule(site.module).weight[site.span] += left @ right
        fill_head(Backbone(self.model).head, *head)
        return predicted(self.model, self.draw.test.images, self.runtime)


def temperatures(runs: list[dict[str, Any]], draw: Draw, logits: Any) -> dict[str, float]:
    """Return temperatures of a model by where they are from."""
    labels = draw.train.images.labels
    found = {"1": 1.0, "prior": PRIOR.median, "best": fit_temperature(logits, draw.test.images.labels)}
    if "held_out" in runs[0]:
        order = np.argsort(np.concatenate([np.flatnonzero(draw.fold_of == fold) for fold in range(FOLDS)]))
        held_out = np.concatenate([run["held_out"].numpy() for run in runs[:FOLDS]])[order]
        found["held_out"] = fit_temperature(held_out, labels)
        found["held_out_prior"] = fit_temperature(held_out, labels, PRIOR)
    return found


def main() -> None:
    """Do what can be done."""
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("folder", type=Path)
    asked.add_argument("size", type=int)
    asked.add_argument("--budget", type=int, default=96)
    asked.add_argument("--ranks", type=int, nargs="*", default=_RANKS)
    asked.add_argument("--times", type=float, nargs="*", default=_TIMES)
    asked.add_argument("--ways", nargs="*", help="those alone")
    given = asked.parse_args()
    values = ("accuracy", *_NLL, "t_held_out", "t_best", "seconds")
    rows = Rows(RESULTS / "spending.csv", ("set", "draw", "image_size", "budget", "way"), values)
    for name, number in ((name, number) for number in range(DRAWS) for name in SETS):
        draw, models = Draw.read(given.folder, name, number, given.size), None
        place = (name, number, given.size, given.budget)
        for way in (way for way in WAYS if not given.ways or way.name in given.ways):
            files = way.files(draw, given.budget)
            if not all(file.exists() for file in files):
                continue
            forms = [""]
            if not way.takes_last and len(files) > 1:
                forms += [f", rank {rank}" for rank in given.ranks] + [f", times {times:g}" for times in given.times]
            missing = [form for form in forms if not rows.has(*place, way.name + form)]
            if not missing:
                continue
            runs = [torch.load(file, weights_only=True) for file in files]  # noqa: TID251 - tensors alone
            used = runs[-1:] if way.takes_last else runs
            mean = {site: mean_update([run["factors"][site] for run in used]) for site in used[0]["factors"]}
            heads = [torch.stack([run["head"][part] for run in used]).mean(0) for part in range(2)]
            for form in missing:
                updates = mean
                if "times" in form:
                    updates = {site: (left * float(form.split()[-1]), right) for site, (left, right) in mean.items()}
                elif form:
                    updates = {site: at_rank(*factors, int(form.split()[-1])) for site, factors in mean.items()}
                if len(used) == 1:
                    logits = used[0]["test"].numpy()
                else:
                    models = models or Models(draw)
                    logits = models.logits(updates, (heads[0], heads[1]))
                found = temperatures(runs, draw, logits)
                of = {source: measured(logits, draw.test.images.labels, t) for source, t in found.items()}
                rows.add(
                    **dict(zip(("set", "draw", "image_size", "budget"), place, strict=True)),
                    way=way.name + form,
                    accuracy=of["1"]["accuracy"],
                    **{f"nll_{source}": value["nll"] for source, value in of.items()},
                    t_held_out=round(found.get("held_out", float("nan")), 3),
                    t_best=round(found["best"], 3),
                    seconds=round(sum(run["seconds"] for run in runs), 1),
                )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
