"""How often what `peft-vit tune` says of its choice is right, over simulated tunings, through the whole pipeline.

Stand-ins take the place of runs, and everything else is the command's own: sizes, search, finalists, forms, the choice.
What is planted is the true accuracy of every recipe. Recipe c has image i right where

    sqrt(rho) z_i + sqrt(1 - rho) (sqrt(w) e_ci + sqrt(1 - w) u_cir) < Phi^-1(accuracy_c + tau t_c),

z of the image, the same for all recipes, e of the image and recipe, u of every run, t of the recipe and the training
images, which all its folds share, all standard normal.

    .venv/bin/python benchmarks/simulated_tunings.py --tunings 100
"""

from __future__ import annotations

import argparse
import hashlib
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import NormalDist
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peft_vit.core.tasks import CLASSIFICATION, Scores
from peft_vit.core.tasks.classification import ACCURACY
from peft_vit.fit.decide import ModelDecision
from peft_vit.fit.fit import Environment, Fit
from peft_vit.fit.outcomes import Outcome, Outcomes
from peft_vit.fit.recipe import Recipe
from peft_vit.fit.request import TuneRequest
from peft_vit.fit.sizes import Regression
from peft_vit.fit.tune import fitted
from peft_vit.runs.costs.estimate import Throughput
from peft_vit.runs.costs.time_limit import FOLDS, Limit

MODEL, SIZES = "test_vit", (32, 48, 64)
_RHO, _OWN = 0.8, 0.7  # of what makes an image hard: the image's own share, and of the rest the recipe's
_CLASSES = 2
_TRAINING = 0.006  # half of what 400 images make a difference scatter by, as a variance
Truth = Callable[[Mapping[str, Any], int], float]  # accuracy of an experiment at an image size


@dataclass
class StandIns:
    """Runs that take no time, and tell the time that they would have taken.

    Attributes:
        truth: accuracy of an experiment at an image size.
        lost: by rounding after training, a share, by number format.
        training: tau, the standard deviation of what the training images do for a recipe.
        images: that are not sealed; as many as a fifth of them are.
        start_s: seconds of a run without its steps.
        step_s: of a step at the largest size.
        seed: of everything that is drawn.
        now: seconds on the clock.
        carried_out: what was done, in its order: study, name, seed.
        kill_after: so many of them the process is killed; None: it is not.
    """

    truth: Truth
    lost: Mapping[str, float] = field(default_factory=dict)
    training: float = 0.0
    images: int = 400
    start_s: float = 6.0
    step_s: float = 0.5
    seed: int = 0
    now: float = 0.0
    carried_out: list[tuple[str, str, int]] = field(default_factory=list)
    kill_after: int | None = None
    done: dict[tuple[str, str, int], Outcome] = field(default_factory=dict)
    accuracy: dict[tuple[str, str], float] = field(default_factory=dict)  # by study and name

    def __call__(self, mapping: Mapping[str, Any], limit: Limit | None) -> Outcomes:
        """Return what came of a study's runs, as far as there is time."""
        study, size = mapping["name"], mapping["data"]["image_size"]
        experiments = {experiment["name"]: experiment for experiment in mapping["experiments"]}
        for seed in [] if limit is None else mapping["seeds"]:
            for name, experiment in experiments.items():
                steps = experiment["training"].get("steps", 0)
                seconds = self.start_s + self.step_s * steps * (size / SIZES[-1]) ** 2
                if (study, name, seed) in self.done or limit.left_s < seconds:
                    continue
                if self.kill_after is not None and len(self.carried_out) >= self.kill_after:
                    raise KeyboardInterrupt
                self.now += seconds
                self.carried_out.append((study, name, seed))
                self.accuracy[study, name] = self.truth(experiment, size)
                tested = self._tested(seed) if mapping["data"]["folds"] else self._sealed()
                self.done[study, name, seed] = self._outcome((study, name, seed), tested, seconds, steps)
        wanted = [(name, seed) for name in experiments for seed in mapping["seeds"]]
        return {at: self.done[study, *at] for at in wanted if (study, *at) in self.done}

    def regress(self, mapping: Mapping[str, Any], _results_dir: Path, half: bool) -> Regression:
        """Return what a regression has on frozen features."""
        (experiment,), size = mapping["experiments"], mapping["data"]["image_size"]
        self.now += self.start_s
        accuracy, images = self.truth(experiment, size), np.arange(self.images)
        right = self._right(f"linear {size}", images, accuracy, 0)
        of_half = self._right(f"linear {size}", images, accuracy - 0.03, 1) if half else None
        labels = self._labels(images)
        metrics = CLASSIFICATION.measure(self._logits(labels, right), labels)
        return Regression(metrics, labels, right, of_half)

    def round_run(self, folder: Path, bits: Sequence[str]) -> dict[str, NDArray[np.float32]]:
        """Return logits of a run's images with rounded weights."""
        study, name, seed = folder.parts[-3], folder.parts[-2], int(folder.parts[-1].removeprefix("seed_"))
        outcome, logits = self.done[study, name, seed], {}
        self.now += self.start_s / 2 + 1.5 * len(bits)
        for one in bits:
            accuracy = self.accuracy[study, name] - self.lost.get(one, 0.0)
            right = self._right(f"{study} {name}", outcome.images, accuracy, seed)
            logits[one] = self._logits(outcome.labels, right)
        return logits

    def _outcome(self, at: tuple[str, str, int], images: NDArray[np.int64], seconds: float, steps: int) -> Outcome:
        study, name, seed = at
        right = self._right(f"{study} {name}", images, self.accuracy[study, name], seed)
        labels = self._labels(images)
        logits, folder = self._logits(labels, right), Path(study) / name / f"seed_{seed}"
        return Outcome(images, labels, logits, seconds, folder, steps=steps)

    def _right(self, recipe: str, images: NDArray[np.int64], accuracy: float, run: int) -> NDArray[np.bool_]:
        def normal(*of: Any) -> NDArray[np.float64]:
            digest = hashlib.sha256(repr((self.seed, *of)).encode()).digest()
            return np.random.default_rng(list(digest)).standard_normal(2 * self.images)

        own = math.sqrt(_OWN) * normal("own", recipe) + math.sqrt(1 - _OWN) * normal("run", recipe, run)
        hard = (math.sqrt(_RHO) * normal("image") + math.sqrt(1 - _RHO) * own)[images]
        accuracy += self.training * float(normal("training images", recipe)[0])
        right: NDArray[np.bool_] = hard < NormalDist().inv_cdf(min(0.999, max(0.001, accuracy)))
        return right

    def _tested(self, seed: int) -> NDArray[np.int64]:
        order = np.random.default_rng([self.seed, seed // FOLDS]).permutation(self.images)
        return np.sort(order[seed % FOLDS :: FOLDS])

    def _sealed(self) -> NDArray[np.int64]:
        return np.arange(self.images, self.images + self.images // 5)

    @staticmethod
    def _labels(images: NDArray[np.int64]) -> NDArray[np.int64]:
        return images % _CLASSES

    @staticmethod
    def _logits(labels: NDArray[np.int64], right: NDArray[np.bool_]) -> NDArray[np.float64]:
        said = np.where(right, labels, 1 - labels)
        logits: NDArray[np.float64] = 2.0 * np.eye(_CLASSES)[said]
        return logits


def planted(rng: np.random.Generator) -> tuple[Truth, dict[str, float]]:
    """Draw a truth: what sizes, training and rates bring, and what rounding loses."""
    base = float(rng.uniform(0.65, 0.9))
    of_size = dict(zip(SIZES, np.sort(rng.uniform(0, 0.04, len(SIZES))), strict=True))
    gain, best_rate = float(rng.choice([-0.01, 0.01, 0.02, 0.04])), float(rng.choice([3e-4, 1e-3, 3e-3]))

    def truth(experiment: Mapping[str, Any], size: int) -> float:
        training, accuracy = experiment["training"], base + of_size[size]
        if experiment["method"] == "linear":
            return accuracy
        away = abs(math.log(training["learning_rate"] / best_rate))
        low = 0.01 if experiment["method"] == "qa_lora" else 0.0
        return accuracy + gain * (1 - math.exp(-training["steps"] / 60)) - 0.004 * away - low

    losses = (0.0, 0.0, 0.005, 0.01, 0.02, 0.04)
    return truth, {"nf4": float(rng.choice(losses))}


def one_tuning(runner: StandIns, minutes: float = 20.0, max_bytes: int | None = None) -> ModelDecision:
    """Tune with stand-ins, and return what was decided."""
    with tempfile.TemporaryDirectory() as folder:
        fit, request = fit_of(runner, output=Path(folder), minutes=minutes, max_bytes=max_bytes)
        decision = fitted(fit, request, {MODEL: list(SIZES)}).decision
        assert decision is not None
        return decision


def fit_of(runner: StandIns, images: Any = None, rate: float = 3e8, **asked: Any) -> tuple[Fit, TuneRequest]:
    """Return a fit with stand-ins, and what it was asked for.

    Args:
        runner: the stand-ins.
        images: see `images_of`; None: as many as the runner's.
        rate: multiply-adds per second.
        asked: of the request.
    """
    settings = {"images": Path("images"), "models": (MODEL,), "image_sizes": SIZES, "seed": runner.seed}
    request = TuneRequest(**settings | {"weights": "random", "compute": "float"} | asked)
    environment = Environment(
        make_runner=lambda _: runner,
        regress=runner.regress,
        round_run=runner.round_run,
        write_output=lambda *_: None,
        throughput=Throughput.estimated(rate),
        clock=lambda: runner.now,
    )
    fit = Fit(request, lambda _: None, environment)
    fit.begin(images or images_of(runner.images))
    return fit, request


def images_of(images: int, **changes: Any) -> Any:
    """Return what a fit asks of so many images, a fifth as many of which test."""
    known = {"num_dev": images, "num_different": images, "num_test": images // 5, "num_outputs": _CLASSES}
    known |= {
        "metric": ACCURACY,
        "task": CLASSIFICATION,
        "scores": Scores(),
        "rarest": math.inf,
        "effective_share": 1.0,
        "shots": math.inf,
    }
    known["inspection"] = SimpleNamespace(path=Path("images"), sides=np.ones((1, 2), int), shorter_side=300.0)
    data = {"dataset": "image-folder", "path": "images", "images_file": "images.json"}
    return SimpleNamespace(**known | {"data": lambda size: {**data, "image_size": size}} | changes)


def true_loss(runner: StandIns, decision: ModelDecision) -> float:
    """Return what the choice truly loses against the best float model that was found, a share."""

    def accuracy(recipe: Recipe) -> float:
        lost = runner.lost.get(recipe.bits or "", 0.0) if recipe.when == "after" else 0.0
        return runner.accuracy[f"folds-{recipe.place}", recipe.trained.name] - lost

    return accuracy(decision.reference) - accuracy(decision.taken.recipe)


def calibration(tunings: int, minutes: float, max_bytes: int | None, first: int = 0) -> dict[str, float]:
    """Return how often the choice loses no more than the margin, and how often that was said, over tunings."""
    said, held, shown, shown_and_wrong, lost = 0.0, 0, 0, 0, 0.0
    for seed in range(first, first + tunings):
        truth, losses = planted(np.random.default_rng(seed))
        runner = StandIns(truth, losses, training=_TRAINING, seed=seed)
        decision = one_tuning(runner, minutes, max_bytes)
        loss, odds = true_loss(runner, decision), decision.odds
        said += 1 - odds.chance_of_loss
        held += loss <= 0.01 + 1e-9
        shown += odds.shown
        shown_and_wrong += odds.shown and loss > 0.01 + 1e-9
        lost += loss
    return {
        "said to keep within the margin": said / tunings,
        "keeps within it": held / tunings,
        "shown": shown / tunings,
        "shown and wrong": shown_and_wrong / tunings,
        "mean loss, points": 100 * lost / tunings,
    }


def main() -> None:
    """Print a line for each amount of time, with and without a limit of bytes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tunings", type=int, default=100)
    asked = parser.parse_args()
    for minutes in (20.0, 60.0):
        for max_bytes in (None, 550_000):
            found = calibration(asked.tunings, minutes, max_bytes)
            said = ", ".join(f"{what} {value:.3f}" for what, value in found.items())
            print(f"{minutes:g} minutes, limit {max_bytes}: {said}", flush=True)


if __name__ == "__main__":
    main()
